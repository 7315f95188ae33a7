"""Log-probs from hidden states on a CPU, by blocks of words for all tokens.

As attention reads its keys: the logits of some words, (words, N), are made, added to each token's
normaliser, and turned into their part of sum_v exp(z_v - shift) W_v while they and their rows of
the weight are in the last cache. The weight is read from memory once and logits are not read from
it at all, where chunks of rows read the weight twice a chunk. That sum needs no gradient of a loss,
so it is d logprob / d hidden (see `linear_token_logprobs`), in two GEMMs. Where the head trains,
the backward goes over the words again, with the gradients of the log-probs.

The gradient of a trained weight, (V, D), needs memory in any case. Logits of N tokens, (V, N), fit
in it if N <= D: they stay there until the backward, which has the gradient's rows take their place
from the last word to the first. That is one GEMM less, and no memory more than at the end.
"""

from __future__ import annotations

from ctypes import byref
from typing import Final, Protocol

import torch
from torch import Tensor

from fastppo.ops.arguments import RowArguments
from fastppo.ops.backends import Statistics
from fastppo.ops.head import Head, HeadArguments, LinearRows, full_precision
from fastppo.ops.native_library import (
    LIBRARY,
    StatisticsStruct,
    WordBlockStruct,
    WordSlopesStruct,
)
from fastppo.ops.products import add_product
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


class Call(Protocol):
    """What the arguments of the operators from hidden states have in common."""

    @property
    def hidden_ND(self) -> Tensor: ...
    @property
    def head(self) -> HeadArguments: ...
    @property
    def rows(self) -> RowArguments: ...
    @property
    def logits_dtype(self) -> torch.dtype: ...
    @property
    def backend(self) -> str: ...


def goes_by_words(a: Call, *, trained: bool) -> bool:
    """Whether `by_words` can do it: in float32, with one label a row and no adapter on the head.

    In 16 bits only where the weight is `trained`: d logprob / d hidden is a small difference of
    large sums where a token is likely, and 16 bits have to subtract before they round. All tokens
    go at a time then, so that a row of the weight's gradient is rounded once. It pays from
    LEAST_TOKENS on, which callers look at first: a call for few is to cost little. They also see
    to it that a shard of a vocabulary goes by rows.
    """
    if a.backend != "native" or a.head.lora_A_RD is not None or a.rows.labels_NK is not None:
        return False
    n, dtype = a.hidden_ND.shape[0], a.hidden_ND.dtype
    if dtype != a.head.weight_VD.dtype:
        return False
    if dtype == torch.float32:
        return a.logits_dtype == dtype
    return dtype in (torch.bfloat16, torch.float16) and trained and n <= _MOST_TOKENS


def logits_fit(hidden_ND: Tensor) -> bool:
    """Whether the float32 logits of all tokens fit in the memory of the weight's gradient."""
    n, size = hidden_ND.shape
    return 0 < n <= _MOST_TOKENS and 4 * _columns(n) <= size * hidden_ND.element_size()


def gradient_memory(weight_VD: Tensor) -> Tensor:
    """Memory for the gradient of the weight, in its dtype."""
    vocab, size = weight_VD.shape
    return fresh((vocab, size), weight_VD.dtype, weight_VD.device)


def by_words(
    chunks: LinearRows,
    rows: RowArguments,
    into: Statistics,
    slope_ND: Tensor | None,
    kept_VD: Tensor | None = None,
) -> None:
    """Write the statistics of all rows into `into`, and d logprob / d hidden into `slope_ND`.

    The logits stay in `kept_VD`, memory of the weight's gradient, where they must fit.
    """
    hidden_ND = chunks.hidden_ND
    with full_precision(hidden_ND.device):
        for at in _parts(hidden_ND.shape[0]):
            own = None if slope_ND is None else slope_ND[at]
            statistics = Statistics(*(result[at] for result in into))
            _some_tokens(_Words(hidden_ND[at], chunks, rows, at, kept_VD), statistics, own)


def gradients_by_words(
    chunks: LinearRows,
    rows: RowArguments,
    stats: Statistics,
    g_N: Tensor | None,
    h_N: Tensor | None,
    kept_VD: Tensor | None = None,
) -> None:
    """Leave in `chunks` the wanted gradients, given those of the log-probs and of the entropies.

    A block's logits are made again, and their gradient is multiplied by the weight's rows and by
    the hidden states while it is in the cache: so each row of the weight's gradient is written
    once, where chunks of rows would add to all of it once a chunk. Logits that were kept are in
    `kept_VD`, which may be the memory of the weight's gradient.
    """
    hidden_ND, live_N = chunks.hidden_ND, chunks.live_N
    assert live_N is not None
    # Their gradient is 0, but 0 times a NaN in the hidden state is NaN.
    hidden_ND = hidden_ND.masked_fill(~live_N[:, None], 0)
    d_hidden_ND, d_weight_VD, d_bias_V, *_ = chunks.grads
    weight_VD = chunks.head.weight_VD
    sum_ND = None
    if d_hidden_ND is not None:
        # In 16 bits a block's part of it is rounded; their sum is not, until the end.
        sum_ND = d_hidden_ND.zero_().float()  # itself in float32
    with full_precision(hidden_ND.device):
        slopes_3N = _slopes(rows, live_N, stats, g_N, h_N)
        for part, at in enumerate(_parts(hidden_ND.shape[0])):
            own_ND, n = hidden_ND[at], at.stop - at.start
            words = _Words(own_ND, chunks, rows, at, kept_VD)
            words.row_max_N[:n] = stats.row_max_N[at]
            own_3N = torch.zeros(3, words.columns)
            own_3N[:, :n] = slopes_3N[:, at]
            out_VN = words.x_VN if kept_VD is None else words.memory()
            slopes = WordSlopesStruct(out_VN.data_ptr(), *(one.data_ptr() for one in own_3N))
            # Kept ones from the end: a block's rows of the weight's gradient lie behind the logits
            # of all blocks before it.
            for some in words.blocks() if kept_VD is None else words.blocks()[::-1]:
                if kept_VD is None:
                    words.make(some)
                else:
                    words.take(some)
                LIBRARY.fastppo_word_gradient(byref(words.struct), byref(slopes))
                some_VN = out_VN[: some.stop - some.start, :n]
                if d_bias_V is not None:
                    d_bias_V[some].add_(some_VN.sum(1, dtype=d_bias_V.dtype))
                some_VN = words.narrowed(some_VN)
                if d_weight_VD is not None:
                    # beta 0 overwrites whatever was there, NaN too.
                    d_weight_VD[some].addmm_(some_VN, own_ND, beta=0 if part == 0 else 1)
                if sum_ND is not None:
                    add_product(sum_ND[at], some_VN.T, weight_VD[some])
    if d_hidden_ND is not None and sum_ND is not None:
        d_hidden_ND.copy_(sum_ND)


def _slopes(
    rows: RowArguments, live_N: Tensor, stats: Statistics, g_N: Tensor | None, h_N: Tensor | None
) -> Tensor:
    """What FastppoWordSlopes has, a row each. Its sums are differences, so in float64.

    dL/dz_v = g (1[v = token] - p_v) - h p_v (log p_v + H),
    log p_v = (u_v - row_max) / tau - log sum_exp
    """
    zero_N = torch.zeros(live_N.shape, dtype=torch.float64)
    possible_N = live_N & (stats.logprob_N != float("-inf"))  # else it cannot be made likelier
    g_N = zero_N if g_N is None else torch.where(possible_N, g_N.double(), 0)
    h_N = zero_N if h_N is None else torch.where(live_N, h_N.double(), 0)
    tau = rows.temperature
    tau = tau.double() if isinstance(tau, Tensor) else tau
    sum_exp_N = torch.where(stats.sum_exp_N == 0, 1, stats.sum_exp_N.double())
    all_N = g_N + h_N * (stats.entropy_N.double() - sum_exp_N.log())
    slopes = (-all_N / tau / sum_exp_N, -h_N / tau**2 / sum_exp_N, g_N / tau)
    return torch.stack(slopes).float()


def _parts(n: int) -> list[slice]:
    """Consecutive slices of n tokens, at most _MOST_TOKENS each."""
    parts = -(-n // _MOST_TOKENS)
    return [slice(i * n // parts, (i + 1) * n // parts) for i in range(parts)]


def _columns(n: int) -> int:
    """Distance of two words' logits of n tokens."""
    return -(-n // _TILE) * _TILE + _COLUMNS


class _Words:
    """The words of the head in blocks, for some tokens: memory, and what the library is told.

    Logits are those of one block, or those of all words at the front of `kept_VD`.
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        chunks: LinearRows,
        rows: RowArguments,
        at: slice,
        kept_VD: Tensor | None,
    ) -> None:
        head, chunk_bytes = chunks.head, chunks.chunk_bytes
        n, vocab = hidden_ND.shape[0], head.weight_VD.shape[0]
        self.hidden_ND, self.weight_VD = hidden_ND, head.weight_VD
        self.columns = columns = _columns(n)
        words = (_BYTES if chunk_bytes is None else chunk_bytes) // (4 * columns)
        self.words = words = min(max(1, words), _MOST_WORDS, vocab)
        self.all_words = kept_VD is not None
        if kept_VD is None:
            self.x_VN = self.memory()
        else:
            as_float32 = kept_VD.view(-1)[: vocab * columns * 4 // kept_VD.element_size()]
            self.x_VN = as_float32.view(torch.float32).view(vocab, columns)
        self.narrow_VN: Tensor | None = None
        self.logits_dtype = chunks.logits_dtype
        if head.weight_VD.dtype != torch.float32:
            self.narrow_VN = fresh((words, n), head.weight_VD.dtype, hidden_ND.device)
        self.token_N = rows.token_N[at].long().contiguous()
        self.bias_V = None if head.bias_V is None else head.bias_V.float().contiguous()
        self.tau_N = torch.ones(columns)
        tau = rows.temperature
        self.tau_N[:n] = tau[at] if isinstance(tau, Tensor) and tau.ndim else tau
        self.row_max_N = torch.full((columns,), _LOWEST)
        self.scale_2N = torch.empty(2, columns)
        self.sampled_N = torch.full((columns,), float("nan"))
        self.struct = WordBlockStruct(
            x_stride=columns,
            n=n,
            vocab=vocab,
            token=self.token_N.data_ptr(),
            ignore_index=rows.ignore_index,
            tau=self.tau_N.data_ptr(),
            factor=self.scale_2N[0].data_ptr(),
            least=self.scale_2N[1].data_ptr(),
            row_max=self.row_max_N.data_ptr(),
            sampled=self.sampled_N.data_ptr(),
            softcap=rows.softcap or 0.0,
        )

    def memory(self) -> Tensor:
        """New memory for one number a token and word of a block."""
        return fresh((self.words, self.columns), torch.float32, self.hidden_ND.device)

    def blocks(self) -> list[slice]:
        """The words of each block."""
        vocab = self.weight_VD.shape[0]
        return [slice(i, min(i + self.words, vocab)) for i in range(0, vocab, self.words)]

    def take(self, some: slice) -> Tensor:
        """Where the logits of a block are; the library is told too."""
        count = some.stop - some.start
        x_VN = self.x_VN[some] if self.all_words else self.x_VN[:count]
        self.struct.x, self.struct.first_word, self.struct.words = (
            x_VN.data_ptr(),
            some.start,
            count,
        )
        if self.bias_V is not None:
            self.struct.bias = self.bias_V[some].data_ptr()
        return x_VN[:, : self.hidden_ND.shape[0]]

    def make(self, some: slice) -> Tensor:
        """The logits of a block."""
        x_VN, weight_VD = self.take(some), self.weight_VD[some]
        if self.narrow_VN is None:
            torch.mm(weight_VD, self.hidden_ND.T, out=x_VN)
        elif self.logits_dtype == torch.float32:
            Head(weight_VD).logits(self.hidden_ND, x_VN.T)
        else:
            own_VN = self.narrow_VN[: x_VN.shape[0]]
            x_VN.copy_(torch.mm(weight_VD, self.hidden_ND.T, out=own_VN))
        return x_VN

    def narrowed(self, x_VN: Tensor) -> Tensor:
        """Numbers of a block in the dtype of the products."""
        if self.narrow_VN is None:
            return x_VN
        return self.narrow_VN[: x_VN.shape[0]].copy_(x_VN)


def _some_tokens(words: _Words, into: Statistics, slope_ND: Tensor | None) -> None:
    weight_VD, block = words.weight_VD, words.struct
    shift_N = torch.full((words.columns,), _LOWEST)
    sums_2N = torch.zeros(2, words.columns, dtype=torch.float64)
    block.shift = shift_N.data_ptr()
    block.sum_exp, block.sum_shifted_exp = (one.data_ptr() for one in sums_2N)
    block.size = weight_VD.shape[1]
    if slope_ND is not None:
        block.slope, block.slope_stride = slope_ND.data_ptr(), slope_ND.stride(0)
    for some in words.blocks():
        some_VN = words.make(some)
        LIBRARY.fastppo_word_block(byref(block))
        if slope_ND is not None:
            # beta 0 overwrites whatever was there, NaN too.
            slope_ND.addmm_(some_VN.T, weight_VD[some], beta=0 if some.start == 0 else 1)
    own_ND = None
    if slope_ND is not None:
        vocab = weight_VD.shape[0]
        own_ND = weight_VD.index_select(0, words.token_N.clamp(0, vocab - 1))
    LIBRARY.fastppo_word_block_end(
        byref(block),
        byref(StatisticsStruct(*(result.data_ptr() for result in into))),
        None if own_ND is None else own_ND.data_ptr(),
    )
