"""Log-probs of actor and reference, entropy and exact KL, directly from hidden states."""

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
)
from fastppo.ops.backends import BACKENDS, Scores
from fastppo.ops.checks import check_device, show
from fastppo.ops.config import HeadLora
from fastppo.ops.head import Head, HeadArguments, chunk_slices, full_precision
from fastppo.ops.operands import check_chunk_bytes, logits_dtype_of, operands
from fastppo.ops.registered import register
from fastppo.ops.score_tokens import empty_scores
from fastppo.ops.shapes import in_shape
from fastppo.ops.workspace import fresh_rows


def linear_score_tokens(
    hidden_ND: Tensor,
    ref_hidden_ND: Tensor,
    weight_VD: Tensor,
    token_N: Tensor,
    *,
    ref_weight_VD: Tensor | None = None,
    bias_V: Tensor | None = None,
    head_lora: HeadLora | None = None,
    ref_head_lora: HeadLora | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    ignore_index: int = IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> Scores:
    r"""`score_tokens` from two policies' hidden states, in nats; one GEMM each, no stored logits.

    Args:
        hidden_ND: float (..., D), the actor's.
        ref_hidden_ND: float (..., D'), the reference's.
        weight_VD: float (V, D), the head.
        token_N: int64 (...), in [0, V), or `ignore_index`.
        ref_weight_VD: float (V, D'), the reference's head; None is the same one.
        bias_V: float (V,), for both heads.
        head_lora, ref_head_lora: adapters on the heads, see HeadLora.
        mask, temperature, softcap, logit_scale, vocab_size, check, backend: as in `score_tokens`.
        chunk_bytes: largest number of bytes of one policy's logits at a time.
        logits_dtype: dtype of the GEMM's result; see `linear_token_logprobs`.

    Returns:
        Scores(logprob_N, ref_logprob_N, entropy_N, exact_kl_N), float32 (float64 for float64
        input).

    Raises:
        ValueError: shapes that disagree, a setting out of range, a backend that cannot run.
        TypeError: inputs of the wrong kind.
    """
    op = "linear_score_tokens"
    head = Head(weight_VD, bias_V, head_lora)
    ref_head = Head(weight_VD if ref_weight_VD is None else ref_weight_VD, bias_V, ref_head_lora)
    hidden_ND, head, lead = operands(op, hidden_ND, head, vocab_size=vocab_size)
    ref_hidden_ND, ref_head, ref_lead = operands(
        op, ref_hidden_ND, ref_head, vocab_size=vocab_size, prefix="ref_"
    )
    check_device(op, "ref_hidden_ND", ref_hidden_ND, hidden_ND)
    vocab, ref_vocab = head.weight_VD.shape[0], ref_head.weight_VD.shape[0]
    if ref_lead != lead or ref_vocab != vocab:
        raise ValueError(
            f"{op}: the reference must have hidden states of shape {show((*lead, 'D'))} and "
            f"{vocab} words, came {show((*ref_lead, 'D'))} and {ref_vocab}"
        )
    chosen = chosen_backend(op, backend, hidden_ND, ref_hidden_ND)
    check_chunk_bytes(op, chunk_bytes)
    rows = row_arguments(
        op,
        token_N,
        hidden_ND,
        vocab,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        check=check,
        lead=lead,
        mask=mask,
        logit_scale=logit_scale,
    )
    given = Arguments(
        hidden_ND,
        head.arguments(),
        ref_hidden_ND,
        ref_head.arguments(),
        rows,
        logits_dtype_of(op, hidden_ND, logits_dtype),
        logits_dtype_of(op, ref_hidden_ND, logits_dtype),
        chunk_bytes,
        chosen,
    )
    with torch.no_grad():
        scores = _registered(given) if is_traced(hidden_ND) else _forward(given)
        return scores if len(lead) == 1 else Scores(*(in_shape(x_N, lead) for x_N in scores))


class Arguments(NamedTuple):
    """Arguments of the registered operator."""

    hidden_ND: Tensor
    head: HeadArguments
    ref_hidden_ND: Tensor
    ref_head: HeadArguments
    rows: RowArguments
    logits_dtype: torch.dtype
    ref_logits_dtype: torch.dtype
    chunk_bytes: int | None
    backend: str


def _forward(a: Arguments) -> Scores:
    head, ref_head, kernels = Head.of(a.head), Head.of(a.ref_head), BACKENDS[a.backend]
    scores, hidden_ND = empty_scores(a.hidden_ND, a.ref_hidden_ND), a.hidden_ND
    n, vocab, device = hidden_ND.shape[0], head.weight_VD.shape[0], hidden_ND.device
    dtypes = (a.logits_dtype, a.ref_logits_dtype)
    wider = max(dtypes, key=lambda dtype: dtype.itemsize)
    chunks = chunk_slices(n, vocab, wider, device, a.chunk_bytes, hidden=hidden_ND.shape[1])
    most = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    own_NV, ref_NV = (fresh_rows(most, vocab, dtype, device) for dtype in dtypes)
    with full_precision(device):
        for chunk in chunks:
            part = slice(0, chunk.stop - chunk.start)
            x_NV = head.logits(hidden_ND[chunk], own_NV[part])
            ref_x_NV = ref_head.logits(a.ref_hidden_ND[chunk], ref_NV[part])
            kernels.score_tokens(x_NV, ref_x_NV, a.rows, chunk, scores)
    return scores


_registered = register(
    "linear_score_tokens",
    Arguments,
    Scores,
    _forward,
    lambda a: empty_scores(a.hidden_ND, a.ref_hidden_ND),
)
