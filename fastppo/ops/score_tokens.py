"""Actor and reference side by side: log-probs, entropy and the exact KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.ops import checks
from fastppo.ops.arguments import RowArguments, row_arguments
from fastppo.ops.backend import choose, row_kernels
from fastppo.ops.rows import RowSpec, RowStats, block_slices, private, statistics

Vectors = tuple[Tensor, Tensor, Tensor, Tensor]


class Scores(NamedTuple):
    """All (N,), in nats, without gradient; 0 on ignored rows."""

    logprob_N: Tensor
    ref_logprob_N: Tensor
    entropy_N: Tensor
    exact_kl_N: Tensor


def score_tokens(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    token_N: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = checks.IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> Scores:
    r"""What scoring needs of two policies' logits, both rows read together, in nats.

        exact_kl = sum_v p_v (log p_v - log q_v)

    Args:
        logits_NV: float (N, V), the actor's; -inf is masked vocabulary, whose terms are 0.
        ref_logits_NV: float (N, V), the reference's.
        token_N: int64 (N,), in [0, V), or `ignore_index`.
        temperature: > 0, a float or a float tensor () or (N,), of both.
        softcap: > 0, or None for none, of both.
        check: also refuse tokens out of range; waits for the device.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        Scores(logprob_N, ref_logprob_N, entropy_N, exact_kl_N), float32 (float64 for float64
        logits). The KL is inf where the actor gives a token that the reference has masked.

    Raises:
        ValueError: shapes that disagree, a setting out of range, a backend that cannot run.
        TypeError: logits that hold no floats, tokens that hold no integers.
    """
    op = "score_tokens"
    for name, logits in (("logits_NV", logits_NV), ("ref_logits_NV", ref_logits_NV)):
        checks.floating(op, name, logits, ndim=2)
    chosen = choose(op, backend, logits_NV, ref_logits_NV)
    n, vocab = logits_NV.shape
    if ref_logits_NV.shape != logits_NV.shape:
        raise ValueError(
            f"{op}: ref_logits_NV must have the shape of logits_NV, {checks.show((n, vocab))}, "
            f"came {checks.show(tuple(ref_logits_NV.shape))}"
        )
    checks.same_device(op, "ref_logits_NV", ref_logits_NV, logits_NV)
    checks.tokens(op, token_N, logits_NV, n=n, vocab=vocab, ignore_index=ignore_index, check=check)
    checks.temperature(op, temperature, logits_NV, n=n)
    checks.softcap(op, softcap)
    rows = row_arguments(token_N, temperature, softcap, ignore_index)
    with torch.no_grad():
        outputs = torch.ops.fastppo.score_tokens(logits_NV, ref_logits_NV, *rows.flat(), chosen)
    return Scores(*outputs)


@torch.library.custom_op(
    "fastppo::score_tokens",
    mutates_args=(),
    schema=f"(Tensor logits_NV, Tensor ref_logits_NV, {RowArguments.SCHEMA}, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(logits_NV: Tensor, ref_logits_NV: Tensor, *flat: Any) -> Vectors:
    *values, backend = flat
    scorer = make_scorer(logits_NV, ref_logits_NV, RowArguments(*values), backend)
    scorer.score(slice(0, logits_NV.shape[0]), logits_NV, ref_logits_NV)
    return scorer.scores


@_forward.register_fake
def _(logits_NV: Tensor, ref_logits_NV: Tensor, *flat: Any) -> Vectors:
    return empty_scores(logits_NV, ref_logits_NV)


def empty_scores(like: Tensor, ref_like: Tensor) -> Vectors:
    """Four uninitialised vectors, one entry a row."""
    dtype = checks.stat_dtype(like, ref_like)
    return tuple(like.new_empty(like.shape[0], dtype=dtype) for _ in Scores._fields)  # type: ignore[return-value]


@dataclass(frozen=True)
class Scorer:
    """Fills in `scores` chunk by chunk."""

    scores: Vectors
    rows: RowArguments
    spec: RowSpec
    backend: str

    def score(self, at: slice, x_NV: Tensor, ref_x_NV: Tensor) -> None:
        """The rows `at`, whose logits these are."""
        if self.backend != "torch":
            row_kernels(self.backend).score_tokens(x_NV, ref_x_NV, self.rows, at, self.scores)
            return
        n, vocab = x_NV.shape
        dtype = self.scores[0].dtype
        for block in block_slices(n, vocab, dtype, x_NV.device):
            mine, theirs = (private(x[block], dtype) for x in (x_NV, ref_x_NV))
            place = slice(at.start + block.start, at.start + block.stop)
            _score_block(self.scores, place, mine, theirs, self.spec)


def make_scorer(like: Tensor, ref_like: Tensor, rows: RowArguments, backend: str) -> Scorer:
    """A scorer for the rows of two policies' logits or hidden states."""
    spec = rows.spec(rows.token_N != rows.ignore_index, checks.stat_dtype(like, ref_like))
    return Scorer(empty_scores(like, ref_like), rows, spec, backend)


def _score_block(scores: Vectors, at: slice, x: Tensor, ref_x: Tensor, spec: RowSpec) -> None:
    """Fill in the rows `at` from private copies of both policies' logits, which are overwritten."""
    here = spec.at(at)
    impossible = x == float("-inf")
    forbidden = ref_x == float("-inf")
    mine, theirs = statistics(x, here), statistics(ref_x, here)
    kl = _exact_kl(mine, theirs, impossible, forbidden).masked_fill(~here.live_N, 0.0)
    for into, found in zip(scores, (mine.logprob, theirs.logprob, mine.entropy, kl), strict=True):
        into[at] = found


def _exact_kl(mine: RowStats, theirs: RowStats, impossible: Tensor, forbidden: Tensor) -> Tensor:
    log_ratio = mine.shifted - theirs.shifted - (mine.log_sum - theirs.log_sum)
    # Not inf in the product: a word that the reference masks may have p = 0 by underflow.
    infinite = (forbidden & ~impossible).any(-1)
    kl = (mine.exp.masked_fill(impossible, 0.0) / mine.total * log_ratio).sum(-1)
    return kl.masked_fill(infinite, float("inf"))
