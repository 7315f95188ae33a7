"""GMPO, VESPO and DRO with numbers that were worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo.ops import losses

LOG = math.log
NAN, INF = float("nan"), float("inf")


def t(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def of(function: Any, ratio: list[float], advantage: float, **settings: Any) -> tuple[Any, Tensor]:
    """The loss of one sequence whose tokens had probability 1/8, and its gradient."""
    old = t([LOG(0.125)] * len(ratio))
    leaf = (old + t(ratio).log()).requires_grad_()
    found = function(leaf, old, t([advantage] * len(ratio)), **settings)
    found.loss.mean().backward()
    return found, leaf.grad[0]


def test_geo_mean_by_hand():
    # Ratios e^0.2 and e^1, the second clipped to e^0.4: their geometric mean is e^0.3.
    found, gradient = of(losses.geo_mean, [math.exp(0.2), math.exp(1.0)], 2.0)
    assert found.loss[0].tolist() == pytest.approx([-2 * math.exp(0.3)] * 2)
    # A token that is not clipped moves the mean by half; the other has no gradient.
    assert gradient.tolist() == pytest.approx([-math.exp(0.3), 0.0])
    assert found.clipped_high.tolist() == [[False, True]]
    # A bad one may not fall below e^-0.4, and may rise.
    found, gradient = of(losses.geo_mean, [math.exp(-1.0), math.exp(1.0)], -1.0)
    assert found.loss[0].tolist() == pytest.approx([math.exp(0.3)] * 2)
    assert gradient.tolist() == pytest.approx([0.0, math.exp(0.3) / 2])
    assert found.clipped_low.tolist() == [[True, False]]


def test_vespo_by_hand():
    # The product of both ratios is 1: the weight is 1, and the gradient REINFORCE's.
    found, gradient = of(losses.vespo, [2.0, 0.5], 3.0)
    assert found.loss[0].tolist() == pytest.approx([3 * LOG(4), 3 * LOG(16)])
    assert gradient.tolist() == pytest.approx([-1.5, -1.5])
    # A product of 4: 4^2 e^(3 (1 - 4)) where A > 0, 4^3 e^(2 (1 - 4)) where A < 0.
    _, gradient = of(losses.vespo, [2.0, 2.0], 1.0)
    assert gradient.tolist() == pytest.approx([-8 * math.exp(-9)] * 2)
    _, gradient = of(losses.vespo, [2.0, 2.0], -1.0)
    assert gradient.tolist() == pytest.approx([32 * math.exp(-6)] * 2)


def test_dro_by_hand():
    # d = log 2: -A log(1/4) + beta/2 d^2, with slope -A + beta d.
    found, gradient = of(losses.dro, [2.0], 1.5, beta=0.4)
    assert found.loss.item() == pytest.approx(1.5 * LOG(4) + 0.2 * LOG(2) ** 2)
    assert gradient.item() == pytest.approx(-1.5 + 0.4 * LOG(2))
    with pytest.raises(ValueError, match="dro: beta must be > 0, came 0"):
        losses.dro(t([-1.0]), t([-1.0]), t([1.0]), beta=0.0)


FUNCTIONS = {
    "geo_mean": (losses.geo_mean, {}),
    "vespo": (losses.vespo, {}),
    "dro": (losses.dro, {"beta": 0.3}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_packed_is_padded_and_what_is_outside_the_mask_is_not_read(name):
    function, settings = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    logprob, old, advantage = -torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 5, generator=generator) < 0.6
    mask[2] = False
    padded = torch.where(mask, logprob, NAN).requires_grad_()
    given = (torch.where(mask, x, NAN) for x in (old, advantage))
    found = function(padded, *given, mask, **settings)
    found.loss.sum().backward()
    assert not found.loss[~mask].any()
    assert not padded.grad[~mask].any()
    lengths = mask.sum(1).int()
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    sequences = {} if name == "dro" else {"offsets": offsets}
    leaf = logprob[mask].requires_grad_()
    packed = function(leaf, old[mask], advantage[mask], **sequences, **settings)
    packed.loss.sum().backward()
    torch.testing.assert_close(packed.loss, found.loss[mask])
    torch.testing.assert_close(leaf.grad, padded.grad[mask])
    with pytest.raises(ValueError, match=f"{name}: ") if sequences else pytest.raises(TypeError):
        function(leaf, old[mask], advantage[mask], offsets=None, **settings)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_impossible_token_has_no_gradient_and_no_nan(name):
    function, settings = FUNCTIONS[name]
    leaf = t([-INF, -1.0], [-0.5, -2.0]).requires_grad_()
    found = function(leaf, t([-1.0, -1.0], [-1.0, -1.0]), t(1.0, -1.0), **settings)
    found.loss.sum().backward()
    assert found.loss.isfinite().all()
    assert leaf.grad.isfinite().all()
    assert leaf.grad[0, 0] == 0
    if name != "dro":  # its sequence is impossible
        assert not leaf.grad[0].any()


def test_the_corrected_kl_of_a_sequence_takes_its_ratio():
    # Log ratios 0.2 and 0.4: the sequence's ratio is e^0.3, for both tokens.
    logprob = t([-1.0, -2.0]).requires_grad_()
    old, ref = t([-1.2, -2.4]), t([-1.5, -1.5])
    found = losses.kl(
        logprob, ref, kind="k1", bias_correction=True, old_logprob=old, ratio_level="sequence"
    )
    found.sum().backward()
    s = math.exp(0.3)
    assert found[0].tolist() == pytest.approx([0.5 * s, -0.5 * s])
    # k1's own slope is 1; the sum of k1 is 0, so the ratio's adds nothing.
    assert logprob.grad[0].tolist() == pytest.approx([s, s])
    with pytest.raises(ValueError, match="kl: ratio_level acts with bias_correction=True"):
        losses.kl(logprob, ref, ratio_level="sequence")
