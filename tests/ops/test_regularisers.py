"""KL and entropy with weights of their own, the KL's correction and limit, and clips by kind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo.ops import PolicyLossConfig, linear_policy_loss, losses, policy_loss
from fastppo.ops.losses import POLICY_LOSSES, SEQUENCE_LOSSES
from tests.ops.oracle import device_of, place
from tests.ops.references import linear_token_logprobs_reference
from tests.ops.test_surrogate import N, gradients, make
from tests.tiers import interpreted

F64 = torch.float64
LEVEL = {"gspo": "sequence", "gspo_token": "sequence_token"}
CASES = {
    "weights apart": {},
    "corrected": {"kl_bias_correction": True},
    "limited": {"kl_limit": 0.05},
    "both": {"kl_bias_correction": True, "kl_limit": 0.05},
}


def with_weights(dtype: torch.dtype = F64) -> dict[str, Any]:
    """Three aggregations in one loss; a row without a weight of its own has others' weights."""
    inputs = make(dtype)
    stat = inputs["weight_N"].dtype
    inputs["kl_weight_N"] = torch.linspace(0.3, 0.01, N, dtype=stat)
    inputs["entropy_weight_N"] = torch.full((N,), 0.11, dtype=stat)
    return {**inputs, "kl_coef": 0.3}


def plain(name: str, inputs: dict[str, Any], settings: dict[str, Any]) -> Tensor:
    """The same from all logits at once, by the public losses and torch's autograd alone."""
    found = linear_token_logprobs_reference(
        inputs["hidden_ND"],
        inputs["weight_VD"],
        inputs["token_N"],
        bias_V=inputs["bias_V"],
        entropy_grad=True,
    )
    live_N, old_N = inputs["weight_N"] != 0, inputs["behaviour_logprob_N"]
    sequences = {"offsets": inputs["offsets"]} if name in SEQUENCE_LOSSES else {}
    given = (found.logprob_N, old_N, inputs["advantage_N"], live_N)
    loss_N = POLICY_LOSSES[name](*given, **sequences).loss * inputs["importance_weight_N"]
    corrected: dict[str, Any] = {}
    if settings.get("kl_bias_correction"):
        level = LEVEL.get(name, "token")
        corrected = {"bias_correction": True, "old_logprob": old_N, "ratio_level": level}
        corrected |= sequences
    limit = settings.get("kl_limit")
    kl_N = losses.kl(found.logprob_N, inputs["ref_logprob_N"], live_N, limit=limit, **corrected)
    bonus_N = inputs["entropy_coef"] * found.entropy_N.masked_fill(~live_N, 0)
    return (
        inputs["weight_N"] * loss_N
        + inputs["kl_weight_N"] * inputs["kl_coef"] * kl_N
        - inputs["entropy_weight_N"] * bonus_N
    ).sum()


@pytest.mark.parametrize("trained", [("hidden_ND",), ("hidden_ND", "weight_VD")], ids="+".join)
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "gspo_token", "cispo"])
def test_from_hidden_states_they_are_the_public_functions(name, settings, trained):
    inputs, config = with_weights(), PolicyLossConfig(**settings)
    want = gradients(lambda given: plain(name, given, settings), inputs, trained)
    got = gradients(
        lambda given: linear_policy_loss(**given, loss=name, config=config, chunk_bytes=2048).loss,
        inputs,
        trained,
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
@interpreted(lambda settings: settings is CASES["both"])
def test_from_logits_they_are_those_from_hidden_states(settings, backend):
    inputs, config = place(with_weights(torch.float32), backend), PolicyLossConfig(**settings)
    want = linear_policy_loss(**inputs, config=config, backend=backend)
    rest = {k: x for k, x in inputs.items() if k not in ("hidden_ND", "weight_VD", "bias_V")}
    logits_NV = inputs["hidden_ND"] @ inputs["weight_VD"].T + inputs["bias_V"]
    got = policy_loss(logits_NV, **rest, config=config, backend=backend)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.kl_N, want.kl_N, atol=1e-5, rtol=1e-5)
    metrics = want.metrics
    total = metrics.surrogate + metrics.kl_loss + metrics.entropy_loss
    torch.testing.assert_close(want.loss, total, atol=1e-6, rtol=1e-6)


def one_token(ratio: float, config: PolicyLossConfig, **weights: float) -> tuple[Any, float]:
    """A word of probability 1/2; log 2 more under the policy than under the reference."""
    logits = torch.zeros(1, 2, dtype=F64, requires_grad=True)
    found = policy_loss(
        logits,
        torch.tensor([0]),
        torch.tensor([math.log(0.5 / ratio)], dtype=F64),
        torch.zeros(1, dtype=F64),
        torch.ones(1, dtype=F64),
        ref_logprob_N=torch.tensor([math.log(0.25)], dtype=F64),
        kl_coef=1.0,
        config=config,
        **{name: torch.tensor([x], dtype=F64) for name, x in weights.items()},
    )
    found.loss.backward()
    return found, logits.grad[0, 0].item() / 0.5


def test_a_corrected_and_a_limited_kl_by_hand():
    # d = log 2: k3 = 1/2 - 1 + log 2 with slope 1 - 1/2; k1 = log 2 with slope 1.
    k3 = math.log(2) - 0.5
    found, slope = one_token(1.5, PolicyLossConfig())
    assert (found.loss.item(), slope) == pytest.approx((k3, 0.5))
    # Times the ratio, whose derivative is itself: 1.5 (1/2 + k3).
    found, slope = one_token(1.5, PolicyLossConfig(kl_bias_correction=True))
    assert (found.loss.item(), slope) == pytest.approx((1.5 * k3, 1.5 * (0.5 + k3)))
    assert found.kl_N.item() == pytest.approx(1.5 * k3)
    # At its limit it is a constant.
    found, slope = one_token(1.5, PolicyLossConfig(kl_limit=0.1))
    assert (found.loss.item(), slope) == pytest.approx((0.1, 0.0))
    # A weight of its own.
    found, slope = one_token(1.5, PolicyLossConfig(), kl_weight_N=3.0)
    assert (found.loss.item(), slope) == pytest.approx((3 * k3, 1.5))
    assert found.metrics.kl_loss.item() == pytest.approx(3 * k3)


def test_an_entropy_weight_of_its_own_by_hand():
    # Two words of 1/2 each: entropy log 2, at its maximum, so the gradient is 0.
    found, _ = one_token(
        1.0, PolicyLossConfig(entropy_coef=0.1), kl_weight_N=0.0, entropy_weight_N=5.0
    )
    assert found.loss.item() == pytest.approx(-0.5 * math.log(2))


def test_a_row_of_weight_0_takes_no_part_whatever_the_other_weights_are(backend):
    inputs = place(with_weights(torch.float32), backend)
    dead = int((inputs["weight_N"] == 0).nonzero()[0])
    inputs["hidden_ND"] = inputs["hidden_ND"].clone()
    inputs["hidden_ND"][dead] = float("nan")
    found = linear_policy_loss(**inputs, backend=backend)
    assert found.loss.isfinite()
    assert found.kl_N[dead] == 0


@pytest.mark.parametrize("by_name", [False, True], ids=("fused", "by name"))
def test_low_high_and_dual_clips_are_counted_apart(by_name, backend):
    """Ratios 0.5, 1, 1.5, 4 with A = 1 and with A = -1, clipped to 1 +- 0.2 and 3 |A|.

    With A = 1 the two above 1.2 are clipped; with A = -1 the one below 0.8 and, by the dual clip,
    the 4. One token has weight 0 and is not counted.
    """
    ratio_N = torch.tensor([0.5, 1.0, 1.5, 4.0] * 2 + [4.0], device=device_of(backend))
    advantage_N = torch.tensor([1.0] * 4 + [-1.0] * 4 + [1.0], device=ratio_N.device)
    weight_N = torch.ones_like(ratio_N)
    weight_N[-1] = 0
    token_N = torch.zeros(9, dtype=torch.long, device=ratio_N.device)
    config = PolicyLossConfig(dual_clip=3.0)
    given = (token_N, math.log(0.5) - ratio_N.log(), advantage_N, weight_N)
    if by_name:
        hidden_ND = torch.zeros(9, 3, device=ratio_N.device)
        weight_VD = torch.zeros(2, 3, device=ratio_N.device)
        found = linear_policy_loss(
            hidden_ND, weight_VD, *given, loss="dr_grpo", config=config, backend=backend
        )
    else:
        logits_NV = torch.zeros(9, 2, device=ratio_N.device)
        found = policy_loss(logits_NV, *given, config=config, backend=backend)
    metrics = found.metrics
    assert metrics.clipped_low_sum == 1
    assert metrics.clipped_high_sum == 2
    assert metrics.dual_clipped_sum == 1
    assert metrics.clipped_sum == 4


def test_a_limit_that_is_not_above_0_is_refused():
    with pytest.raises(ValueError, match="PolicyLossConfig: kl_limit must be > 0, came 0"):
        PolicyLossConfig(kl_limit=0.0)
