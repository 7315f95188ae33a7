"""The critic's clipped loss."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import value_loss


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("value", "old", "goal", "loss", "slope"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0),  # inside: (1-3)^2 / 2; slope v - R
        (1.5, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # held at 1.2, which is the worse: no gradient
        (0.5, 1.0, 3.0, 0.5 * 2.5**2, -2.5),  # held at 0.8, the unclipped is the worse
        (3.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # right on the goal, but too far in one step
        (1.5, 1.0, 0.0, 0.5 * 1.5**2, 1.5),  # moved away from the goal: full gradient back
    ],
)
def test_27_value_clip_closed_form_gradients(value, old, goal, loss, slope):
    v = t(value).requires_grad_()
    result = value_loss(v, t(old), t(goal), t(1.0), clip=0.2)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, abs=1e-12)
    assert v.grad.item() == pytest.approx(slope, abs=1e-12)
    assert result.metrics.clipped_sum.item() == (slope == 0.0)


def test_without_a_clip_it_is_half_the_squared_error():
    assert value_loss(t(5.0), t(0.0), t(1.0), t(0.5), clip=None).loss.item() == 4.0


def test_tokens_of_weight_0_are_not_read():
    nan = float("nan")
    v = t(1.0, nan).requires_grad_()
    result = value_loss(v, t(1.0, nan), t(3.0, nan), t(1.0, 0.0))
    result.loss.backward()
    assert result.loss.item() == 2.0
    assert v.grad.tolist() == [-2.0, 0.0]
    assert [m.item() for m in result.metrics] == [1, 0, 4, 1, 3, 9]


def test_split_batches_add_up():
    torch.manual_seed(0)
    v, old, goal = torch.randn(3, 9, dtype=torch.float64)
    w = torch.rand(9, dtype=torch.float64)
    whole = value_loss(v, old, goal, w)
    parts = [value_loss(v[s], old[s], goal[s], w[s]) for s in (slice(0, 2), slice(2, 9))]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, atol=1e-12, rtol=0)
    for a, b in zip(parts[0].metrics.merge(parts[1].metrics), whole.metrics, strict=True):
        torch.testing.assert_close(a, b)


def test_metrics_give_the_explained_variance():
    torch.manual_seed(1)
    v, goal = torch.randn(2, 50, dtype=torch.float64)
    m = value_loss(v, v, goal, torch.ones_like(v)).metrics
    gap = (m.return_sum - m.value_sum) / m.count
    unexplained = m.error_sum / m.count - gap.square()
    spread = m.return_square_sum / m.count - (m.return_sum / m.count).square()
    want = 1 - (goal - v).var(correction=0) / goal.var(correction=0)
    assert (1 - unexplained / spread).item() == pytest.approx(want.item(), abs=1e-12)


def test_refusals():
    with pytest.raises(ValueError, match="value_loss: clip must be > 0 or None, came 0"):
        value_loss(t(1.0), t(1.0), t(1.0), t(1.0), clip=0)
    with pytest.raises(ValueError, match=r"value_loss: return_N must have shape \(1,\)"):
        value_loss(t(1.0), t(1.0), t(1.0, 2.0), t(1.0))
