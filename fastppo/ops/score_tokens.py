"""Actor and reference side by side: log-probs, entropy and the exact KL."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.ops import checks
from fastppo.ops.backend import choose
from fastppo.ops.registry import Op, Shape, register
from fastppo.ops.rows import RowSpec, RowStats, block_slices, private, row_spec, statistics
from fastppo.ops.token_logprobs import log_probs_reference, make_logits


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
        backend: "torch", or None to choose by device.

    Returns:
        Scores(logprob_N, ref_logprob_N, entropy_N, exact_kl_N), float32 (float64 for float64
        logits). The KL is inf where the actor gives a token that the reference has masked.

    Raises:
        ValueError: shapes that disagree, a setting out of range, a backend that cannot run.
        TypeError: logits that hold no floats, tokens that hold no integers.
    """
    op = "score_tokens"
    choose(op, backend)
    for name, logits in (("logits_NV", logits_NV), ("ref_logits_NV", ref_logits_NV)):
        checks.floating(op, name, logits, ndim=2)
    n, vocab = logits_NV.shape
    if ref_logits_NV.shape != logits_NV.shape:
        raise ValueError(
            f"{op}: ref_logits_NV must have the shape of logits_NV, {checks.show((n, vocab))}, "
            f"came {checks.show(tuple(ref_logits_NV.shape))}"
        )
    checks.tokens(op, token_N, logits_NV, n=n, vocab=vocab, ignore_index=ignore_index, check=check)
    checks.temperature(op, temperature, logits_NV, n=n)
    checks.softcap(op, softcap)
    dtype = checks.stat_dtype(logits_NV, ref_logits_NV)
    spec = row_spec(token_N, token_N != ignore_index, temperature, softcap, dtype)
    scores = empty_scores(logits_NV, n, dtype)
    with torch.no_grad():
        for at in block_slices(n, vocab, dtype, logits_NV.device):
            mine, theirs = (private(x[at], dtype) for x in (logits_NV, ref_logits_NV))
            score_block(scores, at, mine, theirs, spec)
    return scores


def empty_scores(like: Tensor, n: int, dtype: torch.dtype) -> Scores:
    """Four uninitialised vectors."""
    return Scores(*(torch.empty(n, dtype=dtype, device=like.device) for _ in Scores._fields))


def score_block(scores: Scores, at: slice, x: Tensor, ref_x: Tensor, spec: RowSpec) -> None:
    """Fill in the rows `at` from private copies of both policies' logits, which are overwritten."""
    here = spec.at(at)
    impossible = x == float("-inf")
    forbidden = ref_x == float("-inf")
    mine, theirs = statistics(x, here), statistics(ref_x, here)
    scores.logprob_N[at], scores.entropy_N[at] = mine.logprob, mine.entropy
    scores.ref_logprob_N[at] = theirs.logprob
    kl = _exact_kl(mine, theirs, impossible, forbidden)
    scores.exact_kl_N[at] = kl.masked_fill(~here.live_N, 0.0)


def _exact_kl(mine: RowStats, theirs: RowStats, impossible: Tensor, forbidden: Tensor) -> Tensor:
    log_ratio = mine.shifted - theirs.shifted - (mine.log_sum - theirs.log_sum)
    log_ratio = log_ratio.masked_fill(forbidden, float("inf")).masked_fill(impossible, 0.0)
    return (mine.exp.masked_fill(impossible, 0.0) / mine.total * log_ratio).sum(-1)


def score_tokens_reference(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    token_N: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = checks.IGNORE_INDEX,
) -> Scores:
    """The definition of `score_tokens`."""
    live = token_N != ignore_index
    index = torch.where(live, token_N, 0).long()[:, None]
    log_p = log_probs_reference(logits_NV, live, temperature, softcap)
    log_q = log_probs_reference(ref_logits_NV, live, temperature, softcap)
    possible = log_p > float("-inf")
    p = log_p.exp()
    entropy = -torch.where(possible, p * torch.where(possible, log_p, 0), 0).sum(-1)
    kl = torch.where(possible, p * (torch.where(possible, log_p, 0) - log_q), 0).sum(-1)
    results = (log_p.gather(1, index).squeeze(1), log_q.gather(1, index).squeeze(1), entropy, kl)
    return Scores(*(torch.where(live, x, 0) for x in results))


def _make_inputs(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    logits_NV, token_N = make_logits(shape, dtype, seed)
    noise_NV, _ = make_logits(shape, dtype, seed + 1)
    return {
        "logits_NV": logits_NV,
        "ref_logits_NV": logits_NV + 0.1 * noise_NV,
        "token_N": token_N,
    }


register(
    Op(
        name="score_tokens",
        function=score_tokens,
        reference=score_tokens_reference,
        make_inputs=_make_inputs,
        bytes_moved=lambda s, dtype: 2 * s.n * s.vocab * dtype.itemsize,
        flops=lambda s: 14 * s.n * s.vocab,
    )
)
