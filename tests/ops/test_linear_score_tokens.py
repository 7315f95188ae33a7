"""Scoring from hidden states: one GEMM a policy, and what does not fit together is refused."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import HeadLora, linear_score_tokens
from tests.ops.references import linear_score_tokens_reference
from tests.ops.registry import OPS, Shape


def make(**changes):
    inputs = OPS["linear_score_tokens"].make_inputs(
        Shape(n=64, vocab=203, hidden=8), torch.float32, 0
    )
    return {**inputs, **changes}


def test_each_policys_gemm_takes_a_whole_chunk_at_a_time():
    # 96 tokens x 60000 words: blocks for the caches hold 8 rows, and a GEMM a block is slow
    shape = Shape(n=96, vocab=60000, hidden=4)
    inputs = OPS["linear_score_tokens"].make_inputs(shape, torch.float32, 0)
    with torch.profiler.profile(record_shapes=True) as profile:
        linear_score_tokens(**inputs)
    products = [event.input_shapes[:2] for event in profile.events() if event.name == "aten::mm"]
    assert all(a == [96, 4] for a, _ in products)
    assert sum(words for _, (_, words) in products) == 2 * 60000


def test_a_reference_with_fewer_rows_is_refused():
    with pytest.raises(ValueError, match=r"must have .* \(64, D\) and 203 words, came \(5"):
        linear_score_tokens(**make(ref_hidden_ND=torch.zeros(5, 8)))


@pytest.mark.parametrize("chunk_bytes", [None, 1, 5 * 203 * 8])
def test_bias_and_adapters_against_the_definition_whatever_the_chunks(chunk_bytes):
    generator = torch.Generator().manual_seed(1)
    inputs = OPS["linear_score_tokens"].make_inputs(
        Shape(n=17, vocab=203, hidden=8), torch.float64, 0
    )
    shapes = ((203,), (2, 8), (203, 2), (3, 8), (203, 3))
    bias, a, b, c, d = (torch.randn(*s, generator=generator).double() for s in shapes)
    inputs |= {
        "bias_V": bias,
        "head_lora": HeadLora(a, b, 0.5),
        "ref_head_lora": HeadLora(c, d, 0.25),
        "temperature": 0.5 + torch.rand(17, generator=generator).double(),
        "softcap": 6.0,
    }
    want = linear_score_tokens_reference(**inputs)
    for a, b in zip(linear_score_tokens(**inputs, chunk_bytes=chunk_bytes), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("poisoned", ["hidden_ND", "ref_hidden_ND"])
def test_ignored_rows_are_0_and_their_nans_do_not_leak(poisoned):
    want = linear_score_tokens(**make())
    inputs = make()
    inputs["token_N"][5] = -100
    inputs[poisoned] = inputs[poisoned].clone()
    inputs[poisoned][5] = float("nan")
    live = torch.arange(64) != 5
    for a, b in zip(linear_score_tokens(**inputs), want, strict=True):
        assert torch.equal(a[live], b[live])
        assert a[5] == 0
