"""Actor and reference together, and the exact KL between them."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo.ops import linear_score_tokens, score_tokens, token_logprobs

INF = float("inf")


def test_exact_kl_of_two_coins_by_hand():
    # KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln 2/3
    p = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    q = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    got = score_tokens(p, q, torch.tensor([0]))
    assert got.exact_kl_N.item() == pytest.approx(math.log(2) / 2 + math.log(2 / 3) / 2, abs=1e-12)
    assert got.logprob_N.item() == pytest.approx(math.log(0.5))
    assert got.ref_logprob_N.item() == pytest.approx(math.log(0.25))


def test_kl_to_itself_is_0_to_the_bit_and_the_log_probs_are_token_logprobs():
    logits, token = torch.randn(5, 301), torch.randint(301, (5,))
    got = score_tokens(logits, logits, token, temperature=0.7)
    assert not got.exact_kl_N.any()
    want = token_logprobs(logits, token, temperature=0.7)
    assert torch.equal(got.logprob_N, want.logprob_N)
    assert torch.equal(got.entropy_N, want.entropy_N)


def test_masked_vocabulary_adds_nothing_and_a_forbidden_token_is_infinitely_far():
    p = torch.tensor([[0.0, 1.0, -INF], [0.0, 1.0, 0.5]])
    q = torch.tensor([[0.5, 0.0, -INF], [0.5, 0.0, -INF]])
    got = score_tokens(p, q, torch.tensor([0, 0])).exact_kl_N
    want = score_tokens(p[:1, :2], q[:1, :2], torch.tensor([0])).exact_kl_N
    torch.testing.assert_close(got[:1], want)
    assert got[1] == INF


def test_the_mean_of_the_estimate_is_the_exact_kl():
    torch.manual_seed(0)
    p, q = torch.randn(2, 1, 12, dtype=torch.float64)
    every = torch.arange(12)
    got = score_tokens(p.expand(12, 12), q.expand(12, 12), every)
    k1 = got.logprob_N - got.ref_logprob_N
    assert (got.logprob_N.exp() * k1).sum().item() == pytest.approx(got.exact_kl_N[0].item())


def test_from_hidden_states_with_another_reference_head():
    torch.manual_seed(1)
    hidden, ref_hidden = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    weight, ref_weight = torch.randn(9, 4).double(), torch.randn(9, 3).double()
    token = torch.arange(6)
    got = linear_score_tokens(
        hidden, ref_hidden, weight, token, ref_weight_VD=ref_weight, chunk_bytes=1
    )
    want = score_tokens(hidden @ weight.T, ref_hidden @ ref_weight.T, token)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_reference_of_another_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"ref_logits_NV must have the shape .*\(2, 3\), came \(2, 4\)"
    ):
        score_tokens(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2).long())


@pytest.mark.parametrize("poisoned", [0, 1])
def test_ignored_rows_are_0_and_their_nans_do_not_leak(poisoned):
    logits = list(torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(2)))
    want = score_tokens(*logits, torch.tensor([0, 3, 5, 8]))
    logits[poisoned][1] = float("nan")
    got = score_tokens(*logits, torch.tensor([0, -100, 5, 8]))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])
        assert a[1] == 0


@pytest.mark.parametrize("cut", [(slice(None, None, 2),), (slice(4), slice(3, None, 2))])
def test_strided_logits_give_the_same_to_the_bit(cut):
    p, q = torch.randn(2, 8, 22, generator=torch.Generator().manual_seed(3))
    token = torch.tensor([0, 3, 5, 8])
    got = score_tokens(p[cut], q[cut], token)
    want = score_tokens(p[cut].contiguous(), q[cut].contiguous(), token)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
