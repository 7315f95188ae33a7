"""Log-probs from hidden states on a CPU, by blocks of words for all tokens.

As attention reads its keys: the logits of some words, (words, N), are made, added to each token's
normaliser, and turned into their part of sum_v exp(z_v - shift) W_v while they and their rows of
the weight are in the last cache. The weight is read from memory once and logits are not read from
it at all, where chunks of rows read the weight twice a chunk. That sum needs no gradient of a loss,
so it is d logprob / d hidden (see `linear_token_logprobs`), in two GEMMs.
"""

from __future__ import annotations

from ctypes import byref
from typing import Final

import torch
from torch import Tensor

from fastppo.ops.arguments import RowArguments
from fastppo.ops.backends import Statistics
from fastppo.ops.head import Head, LinearRows, full_precision
from fastppo.ops.native_library import LIBRARY, StatisticsStruct, WordBlockStruct
from fastppo.ops.workspace import fresh

# Fewer tokens leave most of a register empty, and threads idle: their rows go through in chunks.
LEAST_TOKENS: Final = 64
_MOST_TOKENS: Final = 2048
_TILE: Final = 32  # FASTPPO_TOKENS of kernels/cpu/abi.h
# A line more than the tiles need: a power of two would put all words on the same few lines.
_COLUMNS: Final = 16
# Of more words a GEMM is no faster, and their logits leave the cache before they are read again.
_MOST_WORDS: Final = 8192
_BYTES: Final = 16 << 20
_LOWEST: Final = torch.finfo(torch.float32).min


def goes_by_words(chunks: LinearRows, rows: RowArguments, backend: str) -> bool:
    """Whether `by_words` can do it: in float32, with one label a row and no adapter on the head.

    It pays from LEAST_TOKENS on, which callers look at first: a call for few is to cost little.
    """
    hidden_ND, head = chunks.hidden_ND, chunks.head
    return (
        backend == "native"
        and hidden_ND.dtype == head.weight_VD.dtype == chunks.logits_dtype == torch.float32
        and head.lora is None
        and rows.labels_NK is None
    )


def by_words(
    chunks: LinearRows, rows: RowArguments, into: Statistics, slope_ND: Tensor | None
) -> None:
    """Write the statistics of all rows into `into`, and d logprob / d hidden into `slope_ND`."""
    hidden_ND = chunks.hidden_ND
    n = hidden_ND.shape[0]
    parts = -(-n // _MOST_TOKENS)
    with full_precision(hidden_ND.device):
        for i in range(parts):
            at = slice(i * n // parts, (i + 1) * n // parts)
            own = None if slope_ND is None else slope_ND[at]
            statistics = Statistics(*(result[at] for result in into))
            _some_tokens(hidden_ND[at], chunks.head, rows, at, chunks.chunk_bytes, statistics, own)


def _some_tokens(
    hidden_ND: Tensor,
    head: Head,
    rows: RowArguments,
    at: slice,
    chunk_bytes: int | None,
    into: Statistics,
    slope_ND: Tensor | None,
) -> None:
    n, size = hidden_ND.shape
    weight_VD, vocab = head.weight_VD, head.weight_VD.shape[0]
    columns = -(-n // _TILE) * _TILE + _COLUMNS
    words = (_BYTES if chunk_bytes is None else chunk_bytes) // (4 * columns)
    words = min(max(1, words), _MOST_WORDS, vocab)
    x_VN = fresh((words, columns), torch.float32, hidden_ND.device)
    token_N = rows.token_N[at].long().contiguous()
    bias_V = None if head.bias_V is None else head.bias_V.float().contiguous()
    tau_N = torch.ones(columns)
    tau = rows.temperature
    tau_N[:n] = tau[at] if isinstance(tau, Tensor) and tau.ndim else tau
    shift_N, row_max_N = torch.full((2, columns), _LOWEST)
    scale_2N = torch.empty(2, columns)
    sampled_N = torch.full((columns,), float("nan"))
    sums_2N = torch.zeros(2, columns, dtype=torch.float64)
    block = WordBlockStruct(
        x=x_VN.data_ptr(),
        x_stride=columns,
        n=n,
        vocab=vocab,
        token=token_N.data_ptr(),
        ignore_index=rows.ignore_index,
        tau=tau_N.data_ptr(),
        factor=scale_2N[0].data_ptr(),
        least=scale_2N[1].data_ptr(),
        shift=shift_N.data_ptr(),
        row_max=row_max_N.data_ptr(),
        sampled=sampled_N.data_ptr(),
        sum_exp=sums_2N[0].data_ptr(),
        sum_shifted_exp=sums_2N[1].data_ptr(),
        slope=None if slope_ND is None else slope_ND.data_ptr(),
        slope_stride=0 if slope_ND is None else slope_ND.stride(0),
        size=size,
        softcap=rows.softcap or 0.0,
    )
    for first in range(0, vocab, words):
        some_VD = weight_VD[first : first + words]
        some_VN = x_VN[: some_VD.shape[0], :n]
        torch.mm(some_VD, hidden_ND.T, out=some_VN)
        block.first_word, block.words = first, some_VD.shape[0]
        block.bias = None if bias_V is None else bias_V[first:].data_ptr()
        LIBRARY.fastppo_word_block(byref(block))
        if slope_ND is not None:
            # beta 0 overwrites whatever was there, NaN too.
            slope_ND.addmm_(some_VN.T, some_VD, beta=0 if first == 0 else 1)
    own_ND = None
    if slope_ND is not None:
        own_ND = weight_VD.index_select(0, token_N.clamp(0, vocab - 1))
    LIBRARY.fastppo_word_block_end(
        byref(block),
        byref(StatisticsStruct(*(result.data_ptr() for result in into))),
        None if own_ND is None else own_ND.data_ptr(),
    )
