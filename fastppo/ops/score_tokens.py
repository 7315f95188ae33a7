"""Log-probs of actor and reference, entropy, and the exact KL between the two."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops.arguments import (
    IGNORE_INDEX,
    RowArguments,
    chosen_backend,
    is_traced,
    row_arguments,
    rows_and_lead,
    stat_dtype,
)
from fastppo.ops.backends import BACKENDS, Scores
from fastppo.ops.checks import check_device, show
from fastppo.ops.registered import register
from fastppo.ops.shapes import first_words, in_shape


def score_tokens(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    token_N: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> Scores:
    r"""Log-probs of two policies, the actor's entropy, and their exact KL, in nats.

        exact_kl = sum_v p_v (log p_v - log q_v)

    Args:
        logits_NV: float (..., V), the actor's; -inf is masked vocabulary, whose terms are 0.
        ref_logits_NV: float (..., V), the reference's.
        token_N: int64 (...), in [0, V), or `ignore_index`.
        mask: bool, or integers 0 and 1, (...): tokens behind it are ignored ones.
        temperature: > 0, a float or a float tensor () or (...), for both.
        softcap, logit_scale, vocab_size: as in `token_logprobs`, for both.
        check: whether to check the range of tokens, which waits for the device.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        Scores(logprob_N, ref_logprob_N, entropy_N, exact_kl_N), float32 (float64 for float64
        logits). The KL is inf if the actor has probability on a token that the reference masks.

    Raises:
        ValueError: shapes that disagree, a setting out of range, a backend that cannot run.
        TypeError: logits that are not floating point, tokens that are not integers.
    """
    op = "score_tokens"
    shape = logits_NV.shape if isinstance(logits_NV, Tensor) else None
    logits_NV, lead = rows_and_lead(op, "logits_NV", logits_NV)
    if isinstance(ref_logits_NV, Tensor) and ref_logits_NV.shape != shape:
        raise ValueError(
            f"{op}: ref_logits_NV must have the shape of logits_NV, "
            f"{show(tuple(shape or ()))}, came {show(tuple(ref_logits_NV.shape))}"
        )
    ref_logits_NV, _ = rows_and_lead(op, "ref_logits_NV", ref_logits_NV)
    if ref_logits_NV.device != logits_NV.device:
        check_device(op, "ref_logits_NV", ref_logits_NV, logits_NV)
    if vocab_size is not None:
        logits_NV = first_words(op, logits_NV, vocab_size)
        ref_logits_NV = first_words(op, ref_logits_NV, vocab_size)
    chosen = chosen_backend(op, backend, logits_NV, ref_logits_NV)
    rows = row_arguments(
        op,
        token_N,
        logits_NV,
        logits_NV.shape[1],
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        check=check,
        lead=lead,
        mask=mask,
        logit_scale=logit_scale,
    )
    given = Arguments(logits_NV, ref_logits_NV, rows, chosen)
    with torch.no_grad():
        scores = _registered(given) if is_traced(logits_NV) else _forward(given)
        return scores if len(lead) == 1 else Scores(*(in_shape(x_N, lead) for x_N in scores))


class Arguments(NamedTuple):
    """Arguments of the registered operator."""

    logits_NV: Tensor
    ref_logits_NV: Tensor
    rows: RowArguments
    backend: str


def empty_scores(like: Tensor, ref_like: Tensor) -> Scores:
    """Uninitialised Scores for the rows of `like`; results of a registered op share no memory."""
    n, dtype = like.shape[0], stat_dtype(like, ref_like)
    return Scores(
        like.new_empty(n, dtype=dtype),
        like.new_empty(n, dtype=dtype),
        like.new_empty(n, dtype=dtype),
        like.new_empty(n, dtype=dtype),
    )


def _forward(a: Arguments) -> Scores:
    scores, everything = empty_scores(a.logits_NV, a.ref_logits_NV), slice(0, a.logits_NV.shape[0])
    BACKENDS[a.backend].score_tokens(a.logits_NV, a.ref_logits_NV, a.rows, everything, scores)
    return scores


_registered = register(
    "score_tokens",
    Arguments,
    Scores,
    _forward,
    lambda a: empty_scores(a.logits_NV, a.ref_logits_NV),
)
