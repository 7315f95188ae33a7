"""The two passes of `linear_token_logprobs`: by blocks of words, or by chunks of rows."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops.arguments import RowArguments, live_rows, stat_dtype
from fastppo.ops.backends import BACKENDS, Statistics
from fastppo.ops.head import WEIGHT, Head, HeadArguments, HeadGradients, LinearRows
from fastppo.ops.labels import label_logprobs
from fastppo.ops.sharded_head import ShardedRows, VocabShard
from fastppo.ops.token_logprobs import backward_at, empty_statistics, with_label_logprobs
from fastppo.ops.word_blocks import (
    LEAST_TOKENS,
    by_words,
    goes_by_words,
    gradient_memory,
    gradients_by_words,
    logits_fit,
)


class Arguments(NamedTuple):
    """Arguments of the registered operator; `wanted` is for hidden states, weight, bias, A, B."""

    hidden_ND: Tensor
    head: HeadArguments
    rows: RowArguments
    logits_dtype: torch.dtype
    chunk_bytes: int | None
    entropy_grad: bool
    keep_logits: bool
    wanted: tuple[bool, ...]
    backend: str

    @property
    def by_slope(self) -> bool:
        """Whether the forward computes the gradient of the hidden states."""
        hidden, weight, *_ = self.wanted
        return hidden and not weight and self.rows.labels_NK is None


class Outputs(NamedTuple):
    """Results of the registered operator: statistics, and what may be empty."""

    logprob_N: Tensor  # (N, K) with several labels a row
    entropy_N: Tensor
    row_max_N: Tensor
    sum_exp_N: Tensor
    logprob_slope_ND: Tensor  # d logprob_i / d hidden_i
    entropy_slope_ND: Tensor
    kept_VD: Tensor  # memory of the weight's gradient, with the logits: see word_blocks.py


class BackwardArguments(NamedTuple):
    """Arguments of the backward; `wanted` is for hidden states, weight, bias, A and B."""

    g_N: Tensor | None
    h_N: Tensor | None
    wanted: tuple[bool, ...]
    hidden_ND: Tensor
    head: HeadArguments
    rows: RowArguments
    logits_dtype: torch.dtype
    chunk_bytes: int | None
    stats: Statistics
    backend: str


def _chunks(
    a: Arguments | BackwardArguments,
    wanted: tuple[bool, ...],
    shard: VocabShard | None,
    memory_VD: Tensor | None = None,
) -> LinearRows:
    head = Head.of(a.head).detach()
    live_N = live_rows(a.rows) if any(wanted) else None
    hidden_ND, stat = a.hidden_ND.detach(), stat_dtype(a.hidden_ND)
    given = (hidden_ND, head, stat, a.logits_dtype, a.chunk_bytes, live_N, wanted, memory_VD)
    return LinearRows(*given) if shard is None else ShardedRows(*given, shard=shard)


def forward(a: Arguments, shard: VocabShard | None = None) -> Outputs:
    stats = empty_statistics(a.hidden_ND, a.backend)
    kernels = BACKENDS[a.backend] if shard is None else shard.kernels(a.rows, a.backend)
    slopes = empty_outputs(a)
    chunks = _chunks(a, (False,) * 5, shard)
    many = a.hidden_ND.shape[0] >= LEAST_TOKENS and shard is None
    many = many and not (a.by_slope and a.entropy_grad)
    if many and goes_by_words(a, trained=a.wanted[WEIGHT]):
        kept_VD = None
        if a.keep_logits and logits_fit(a.hidden_ND):
            kept_VD = gradient_memory(a.head.weight_VD)
            slopes = (*slopes[:2], kept_VD)
        by_words(chunks, a.rows, stats, slopes[0] if a.by_slope else None, kept_VD)
        return Outputs(*stats, *slopes)
    if not a.by_slope:
        labelled = with_label_logprobs(stats, a.rows)

        def kernel(at: slice, x_NV: Tensor, _: Tensor | None) -> None:
            kernels.token_logprobs(x_NV, a.rows, at, stats if shard is None else labelled)
            if a.rows.labels_NK is not None and shard is None:
                labelled.logprob_N[at] = label_logprobs(x_NV, a.rows, at, stats)

        chunks.visit(kernel, write=False)
        return Outputs(*labelled, *slopes)
    one_N = torch.ones_like(stats.logprob_N)
    # Only the last one may overwrite the logits.
    derived: list[tuple[Tensor, Tensor | None, Tensor | None]] = [(slopes[0], one_N, None)]
    if a.entropy_grad:
        derived.insert(0, (slopes[1], None, one_N))
    for at, x_NV, dx_NV in chunks.made(a.hidden_ND.dtype, apart=a.entropy_grad):
        assert dx_NV is not None
        kernels.token_logprobs(x_NV, a.rows, at, stats)
        for slope_ND, g_N, h_N in derived:
            kernels.token_logprobs_backward(x_NV, dx_NV, a.rows, at, stats, g_N, h_N)
            chunks.to_hidden(dx_NV, slope_ND[at])
    return Outputs(*stats, *slopes)


def empty_outputs(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for d logprob / d hidden and d entropy / d hidden if wanted, and none for logits."""
    shape, like = a.hidden_ND.shape, a.hidden_ND
    return (
        like.new_empty(shape if a.by_slope else 0),
        like.new_empty(shape if a.by_slope and a.entropy_grad else 0),
        like.new_empty(0),
    )


def backward(
    a: BackwardArguments, shard: VocabShard | None = None, kept_VD: Tensor | None = None
) -> HeadGradients:
    """The wanted gradients; logits that are not kept are made again, by words or by chunks."""
    words = a.hidden_ND.shape[0] >= LEAST_TOKENS and shard is None
    words = words and goes_by_words(a, trained=a.wanted[WEIGHT])
    memory_VD = kept_VD
    if words and memory_VD is None and a.wanted[WEIGHT]:
        memory_VD = gradient_memory(a.head.weight_VD)
    chunks = _chunks(a, a.wanted, shard, memory_VD)
    if words:
        gradients_by_words(chunks, a.rows, a.stats, a.g_N, a.h_N, kept_VD)
        return chunks.results()
    kernels = BACKENDS[a.backend] if shard is None else shard.kernels(a.rows, a.backend)
    gradient = partial(backward_at, kernels) if shard is None else kernels.token_logprobs_backward

    def kernel(at: slice, x_NV: Tensor, out_NV: Tensor | None) -> None:
        assert out_NV is not None
        gradient(x_NV, out_NV, a.rows, at, a.stats, a.g_N, a.h_N)

    chunks.visit(kernel, write=True)
    return chunks.results()
