"""Scoring from hidden states: one GEMM a policy, and what does not fit together is refused."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import linear_score_tokens
from fastppo.ops.registry import OPS, Shape


def make(**changes):
    inputs = OPS["linear_score_tokens"].make_inputs(
        Shape(n=64, vocab=203, hidden=8), torch.float32, 0
    )
    return {**inputs, **changes}


def test_two_policies_cost_one_gemm_each():
    inputs = make()
    with torch.profiler.profile(with_flops=True) as profile:
        linear_score_tokens(**inputs)
    flops = sum(event.flops for event in profile.events() if event.name == "aten::mm")
    assert flops == pytest.approx(2 * 2 * 64 * 203 * 8, rel=0.01)


def test_each_policys_gemm_takes_a_whole_chunk_at_a_time():
    # 96 tokens x 60000 words: blocks for the caches hold 8 rows, and a GEMM a block is slow
    shape = Shape(n=96, vocab=60000, hidden=4)
    inputs = OPS["linear_score_tokens"].make_inputs(shape, torch.float32, 0)
    with torch.profiler.profile() as profile:
        linear_score_tokens(**inputs)
    assert sum(event.name == "aten::mm" for event in profile.events()) == 2


def test_a_reference_with_fewer_rows_is_refused():
    with pytest.raises(ValueError, match="the reference must have 64 rows and 203 words, came 5"):
        linear_score_tokens(**make(ref_hidden_ND=torch.zeros(5, 8)))
