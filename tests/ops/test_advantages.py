"""Scores, KL and values to advantages."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import advantages, gae, whiten
from tests.ops.references import advantages_reference

AT = torch.tensor([0, 1, 4, 9], dtype=torch.int32)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    lp, ref, value = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    score = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    return {
        "score_B": score,
        "logprob_N": lp,
        "ref_logprob_N": ref,
        "value_N": value,
        "offsets": AT,
        "kl_coef": 0.1,
    }


def test_one_response_by_hand():
    # r = (-0.5 * 1, -0.5 * 2 + 3); V = 0: with gamma = lam = 1 returns are what is still to come
    got = advantages(
        torch.tensor([3.0]),
        torch.tensor([-1.0, -1.0]),
        torch.tensor([-2.0, -3.0]),
        torch.zeros(2),
        torch.tensor([0, 2], dtype=torch.int32),
        kl_coef=0.5,
        lam=1.0,
        whiten_advantages=False,
    )
    assert got.kl_N.tolist() == [1.0, 2.0]
    assert got.reward_N.tolist() == [-0.5, 2.0]
    assert got.return_N.tolist() == [1.5, 2.0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kl_kind": "k3", "whiten_rewards": True, "gamma": 0.9},
        {"kl_N": torch.linspace(0, 1, 9).double(), "whiten_advantages": False},
        {"extra_reward_N": torch.linspace(0, 1, 9).double(), "kl_coef": torch.tensor(0.3)},
        {"bootstrap_value_B": torch.tensor([1.0, 2.0, 3.0]).double()},
    ],
    ids=str,
)
def test_every_setting_against_the_definition(inputs, changes):
    got, want = advantages(**{**inputs, **changes}), advantages_reference(**{**inputs, **changes})
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_22_reward_whitening_keeps_the_mean(inputs):
    plain = advantages(**inputs).reward_N
    whitened = advantages(**inputs, whiten_rewards=True).reward_N
    assert whitened.mean().item() == pytest.approx(plain.mean().item(), abs=1e-12)
    assert whitened.var().item() == pytest.approx(1.0, abs=1e-6)


def test_25_returns_are_unwhitened_advantages_plus_values(inputs):
    got = advantages(**inputs)
    advantage, returns = gae(got.reward_N, inputs["value_N"], AT)
    assert torch.equal(got.return_N, returns)
    torch.testing.assert_close(got.return_N, advantage + inputs["value_N"])
    assert torch.equal(got.advantage_N, whiten(advantage))


def test_the_score_of_a_response_without_tokens_is_ignored(inputs):
    at = torch.tensor([0, 1, 4, 4, 9], dtype=torch.int32)
    score = torch.tensor([1.0, -2.0, 100.0, 0.5], dtype=torch.float64)
    with_it = advantages(**{**inputs, "offsets": at, "score_B": score})
    assert torch.equal(with_it.reward_N, advantages(**inputs).reward_N)


def test_17_nothing_carries_a_gradient(inputs):
    live = {
        k: x.clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
        for k, x in inputs.items()
    }
    assert not any(x.requires_grad for x in advantages(**live))


def test_refusals(inputs):
    with pytest.raises(
        ValueError, match=r"advantages: score_B must have shape \(3,\).*came \(2,\)"
    ):
        advantages(**{**inputs, "score_B": torch.zeros(2)})
    with pytest.raises(ValueError, match="advantages: KL kind must be one of"):
        advantages(**inputs, kl_kind="full")
