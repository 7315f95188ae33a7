"""Log-probs from hidden states: gradients of the whole head, and logits a chunk at a time."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import HeadLora, linear_token_logprobs
from fastppo.ops.linear_token_logprobs import linear_token_logprobs_reference, make_hidden
from fastppo.ops.registry import Shape

F64 = torch.float64


@pytest.mark.parametrize("chunk_bytes", [None, 1, 3000])
def test_gradients_of_hidden_states_weight_bias_and_adapter(chunk_bytes):
    grads = []
    for function in (linear_token_logprobs, linear_token_logprobs_reference):
        generator = torch.Generator().manual_seed(3)
        inputs = make_hidden(Shape(n=11, vocab=53, hidden=7), F64, 0)
        a, b, bias = (
            torch.randn(*s, generator=generator, dtype=F64) for s in ((2, 7), (53, 2), (53,))
        )
        leaves = [inputs["hidden_ND"], inputs["weight_VD"], bias, a, b]
        for leaf in leaves:
            leaf.requires_grad_()
        extra = {"chunk_bytes": chunk_bytes} if function is linear_token_logprobs else {}
        out = function(**inputs, bias_V=bias, head_lora=HeadLora(a, b, 0.7), softcap=5.0, **extra)
        (out.logprob_N.square().sum() + out.entropy_N.sum()).backward()
        grads.append([leaf.grad for leaf in leaves])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)


def test_no_more_logits_exist_at_a_time_than_the_budget_allows():
    inputs = make_hidden(Shape(n=256, vocab=2000, hidden=8), torch.float32, 0)
    budget = 16 * 2000 * 4
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        linear_token_logprobs(**inputs, chunk_bytes=budget)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    # The chunk, its exponentials, and a few columns; all logits would be 16 chunks.
    assert peak < 3.5 * budget


def test_ignored_rows_are_0():
    inputs = make_hidden(Shape(n=3, vocab=5, hidden=4), torch.float32, 0)
    inputs["token_N"][1] = -100
    got = linear_token_logprobs(**inputs)
    assert got.logprob_N[1] == got.entropy_N[1] == 0
    assert (got.logprob_N[[0, 2]] < 0).all()
