"""Advantages and returns of packed sequences."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import gae
from tests.ops.oracle import cast, place
from tests.ops.references import gae_reference
from tests.ops.registry import OPS, Shape

# Around a warp's lanes, a program's and a block's; one of none, one of several blocks.
LENGTHS = (1, 31, 32, 33, 0, 127, 128, 129, 1023, 1024, 1025, 5000)


def t(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_two_steps_by_hand():
    # lam=1, gamma=1: A_1 = r_1 - V_1 = 3 - 1; A_0 = (r_0 + V_1 - V_0) + A_1 = (0 + 1 - 2) + 2
    advantage, returns = gae(t([0.0, 3.0]), t([2.0, 1.0]), offsets(0, 2), lam=1.0)
    assert advantage.tolist() == [1.0, 2.0]
    assert returns.tolist() == [3.0, 3.0]


def test_lam_0_is_one_step_and_lam_1_is_the_rest_of_the_sequence():
    r, v = t([1.0, 2.0, 4.0]), t([10.0, 20.0, 40.0])
    one, _ = gae(r, v, offsets(0, 3), lam=0.0, gamma=0.5)
    assert one.tolist() == [1 + 10 - 10, 2 + 20 - 20, 4 - 40]
    _, returns = gae(r, v, offsets(0, 3), lam=1.0, gamma=0.5)
    assert returns.tolist() == [1 + 1 + 1, 2 + 2, 4]


@pytest.mark.parametrize("bootstrap", [False, True])
def test_24_gae_against_the_quadratic_sum_on_ragged_sequences(bootstrap):
    torch.manual_seed(0)
    r, v = torch.randn(2, 20, dtype=torch.float64)
    at = offsets(0, 1, 1, 8, 9, 20)  # an empty sequence too
    after = torch.randn(5, dtype=torch.float64) if bootstrap else None
    settings = {"gamma": 0.97, "lam": 0.9, "bootstrap_value_B": after}
    for a, b in zip(gae(r, v, at, **settings), gae_reference(r, v, at, **settings), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_a_sequence_knows_nothing_of_its_neighbours():
    torch.manual_seed(0)
    r, v = torch.randn(2, 9)
    together = gae(r, v, offsets(0, 4, 9))[0]
    alone = torch.cat([gae(r[:4], v[:4], offsets(0, 4))[0], gae(r[4:], v[4:], offsets(0, 5))[0]])
    assert torch.equal(together, alone)


def test_undiscounted_rewards_of_1_count_what_is_left_at_every_length(backend):
    at = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0).int()
    n = int(at[-1])
    inputs = {"reward_N": torch.ones(n), "value_N": torch.zeros(n), "offsets": at}
    advantage, _ = gae(**place(inputs, backend), gamma=1.0, lam=1.0, backend=backend)
    # Whole numbers below 2^24: exact, in whatever order they are added.
    left = torch.cat([torch.arange(length, 0, -1) for length in LENGTHS])
    assert advantage.tolist() == left.tolist()


@pytest.mark.parametrize("name", ["gae", "advantages"])
def test_scans_of_every_length_are_the_definitions(name, fused):
    at = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0).int()
    op = OPS[name]
    inputs = op.make_inputs(Shape(n=int(at[-1]), batch=len(LENGTHS)), torch.float32, 1)
    after = torch.linspace(-1, 1, len(LENGTHS))
    inputs |= {"offsets": at, "gamma": 0.99, "lam": 0.9, "bootstrap_value_B": after}
    want = op.function(**cast(inputs, torch.float64), backend="torch")
    got = op.function(**place(inputs, fused), backend=fused)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, atol=2e-5, rtol=2e-5)


def test_no_gradient_flows_back():
    r, v = torch.randn(2, 3).requires_grad_()
    advantage, returns = gae(r, v, offsets(0, 3))
    assert not advantage.requires_grad
    assert not returns.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offsets": offsets(0, 2)}, ValueError, "start at 0 and end at N=3, came 0 and 2"),
        ({"offsets": offsets(0, 3, 2, 3)}, ValueError, "offsets must ascend"),
        ({"offsets": t([0, 3])}, TypeError, "offsets must be int32"),
        ({"gamma": 1.5}, ValueError, r"gamma must lie in \[0, 1\], came 1.5"),
        ({"lam": -0.1}, ValueError, r"lam must lie in \[0, 1\], came -0.1"),
        ({"value_N": t([1.0])}, ValueError, r"value_N must have shape \(3,\).*came \(1,\)"),
        (
            {"bootstrap_value_B": t([1.0, 2.0])},
            ValueError,
            r"bootstrap_value_B must have shape \(1,\)",
        ),
    ],
)
def test_refusals_name_op_argument_wanted_and_came(change, error, message):
    inputs = {
        "reward_N": t([1.0, 2.0, 3.0]),
        "value_N": t([1.0, 2.0, 3.0]),
        "offsets": offsets(0, 3),
    }
    with pytest.raises(error, match="^gae: .*" + message):
        gae(**{**inputs, **change})
