"""Estimates of the KL from the sampled token."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo.ops import token_kl


def test_four_kinds_by_hand():
    # d = ln 2: k1 = d, k2 = d^2 / 2, k3 = 1/2 - 1 + d
    lp, ref = torch.tensor([0.5, 0.25], dtype=torch.float64).log().split(1)
    d = math.log(2)
    for kind, want in {"k1": d, "abs": d, "k2": d * d / 2, "k3": d - 0.5}.items():
        assert token_kl(lp, ref, kind=kind).item() == pytest.approx(want, abs=1e-12)
    assert token_kl(ref, lp, kind="k1").item() == pytest.approx(-d)
    assert token_kl(ref, lp, kind="abs").item() == pytest.approx(d)


def test_37_k1_may_be_negative_k3_never():
    torch.manual_seed(0)
    lp, ref = -torch.rand(2, 1000).double() * 8
    assert (token_kl(lp, ref, kind="k1") < 0).any()
    for kind in ("abs", "k2", "k3"):
        assert (token_kl(lp, ref, kind=kind) >= 0).all()
    far = token_kl(torch.tensor([-500.0]), torch.tensor([0.0]), kind="k3")
    assert torch.isfinite(far).all()


def test_k1_and_k3_are_both_unbiased():
    torch.manual_seed(1)
    p, q = torch.randn(2, 50).double().log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * token_kl(p, q, kind=kind)).sum(), exact)


def test_the_gradient_of_abs_is_0_at_0():
    lp = torch.tensor([0.0, -1.0], requires_grad=True)
    token_kl(lp, torch.tensor([0.0, 0.0]), kind="abs").sum().backward()
    assert lp.grad.tolist() == [0.0, -1.0]


def test_a_masked_sample_adds_nothing():
    lp = torch.tensor([-float("inf"), -1.0], requires_grad=True)
    for kind in ("k1", "abs", "k2", "k3"):
        kl = token_kl(lp, torch.tensor([-1.0, -1.0]), kind=kind)
        assert kl.tolist() == [0.0, 0.0]
        lp.grad = None
        kl.sum().backward()
        assert lp.grad[0] == 0


def test_refusals():
    with pytest.raises(
        ValueError, match="token_kl: KL kind must be one of k1, abs, k2, k3, came 'kl'"
    ):
        token_kl(torch.zeros(1), torch.zeros(1), kind="kl")
    with pytest.raises(ValueError, match=r"token_kl: ref_logprob_N must have shape \(1,\)"):
        token_kl(torch.zeros(1), torch.zeros(2))
