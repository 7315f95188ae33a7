"""Actor and reference side by side, straight from their hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppo.ops import checks
from fastppo.ops.arguments import RowArguments, row_arguments
from fastppo.ops.backend import choose
from fastppo.ops.config import HeadLora
from fastppo.ops.head import (
    HEAD_SCHEMA,
    Head,
    check_head,
    chunk_slices,
    full_precision,
    logits_dtype_of,
)
from fastppo.ops.score_tokens import (
    Scores,
    Vectors,
    empty_scores,
    make_scorer,
)
from fastppo.ops.workspace import fresh


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
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    ignore_index: int = checks.IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> Scores:
    r"""`score_tokens` of two policies' hidden states, in nats, one GEMM each and no logits kept.

    Args:
        hidden_ND: float (N, D), the actor's.
        ref_hidden_ND: float (N, D'), the reference's.
        weight_VD: float (V, D), the head.
        token_N: int64 (N,), in [0, V), or `ignore_index`.
        ref_weight_VD: float (V, D'), the reference's head; None is the same one.
        bias_V: float (V,), of both heads.
        head_lora, ref_head_lora: adapters on the heads, see HeadLora.
        temperature, softcap, check, backend: as in `score_tokens`.
        chunk_bytes: how many bytes of one policy's logits may exist at a time.
        logits_dtype: what the GEMM gives; None is the operands' dtype.

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
    check_head(op, hidden_ND, head)
    check_head(op, ref_hidden_ND, ref_head, "ref_hidden_ND")
    chosen = choose(op, backend, hidden_ND, ref_hidden_ND)
    n, vocab = hidden_ND.shape[0], weight_VD.shape[0]
    if ref_hidden_ND.shape[0] != n or ref_head.weight_VD.shape[0] != vocab:
        raise ValueError(
            f"{op}: the reference must have {n} rows and {vocab} words, "
            f"came {ref_hidden_ND.shape[0]} and {ref_head.weight_VD.shape[0]}"
        )
    checks.tokens(op, token_N, hidden_ND, n=n, vocab=vocab, ignore_index=ignore_index, check=check)
    checks.temperature(op, temperature, hidden_ND, n=n)
    checks.softcap(op, softcap)
    checks.same_device(op, "ref_hidden_ND", ref_hidden_ND, hidden_ND)
    rows = row_arguments(token_N, temperature, softcap, ignore_index)
    own_dtype = logits_dtype_of(op, hidden_ND, logits_dtype)
    ref_dtype = logits_dtype_of(op, ref_hidden_ND, logits_dtype)
    with torch.no_grad():
        outputs = torch.ops.fastppo.linear_score_tokens(
            hidden_ND,
            *head.flat(),
            ref_hidden_ND,
            *ref_head.flat(),
            *rows.flat(),
            own_dtype,
            ref_dtype,
            chunk_bytes,
            chosen,
        )
    return Scores(*outputs)


@torch.library.custom_op(
    "fastppo::linear_score_tokens",
    mutates_args=(),
    schema=f"(Tensor hidden_ND, {HEAD_SCHEMA}, Tensor ref_hidden_ND, "
    + ", ".join(part.replace(" ", " ref_", 1) for part in HEAD_SCHEMA.split(", "))
    + f", {RowArguments.SCHEMA}, ScalarType logits_dtype, ScalarType ref_logits_dtype, "
    "int? chunk_bytes, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(hidden_ND: Tensor, *flat: Any) -> Vectors:
    head, ref_hidden_ND, ref_head = Head.of(flat[:5]), flat[5], Head.of(flat[6:11])
    rows = RowArguments(*flat[11:16])
    own_dtype, ref_dtype, chunk_bytes, backend = flat[16:]
    scorer = make_scorer(hidden_ND, ref_hidden_ND, rows, backend)
    n, vocab, device = hidden_ND.shape[0], head.weight_VD.shape[0], hidden_ND.device
    wider = own_dtype if own_dtype.itemsize > ref_dtype.itemsize else ref_dtype
    chunks = chunk_slices(n, vocab, wider, device, chunk_bytes)
    size = (max((chunk.stop - chunk.start for chunk in chunks), default=0), vocab)
    own_NV, ref_NV = fresh(size, own_dtype, device), fresh(size, ref_dtype, device)
    with full_precision(device):
        for chunk in chunks:
            part = slice(0, chunk.stop - chunk.start)
            x_NV = head.logits(hidden_ND[chunk], own_NV[part])
            scorer.score(chunk, x_NV, ref_head.logits(ref_hidden_ND[chunk], ref_NV[part]))
    return scorer.scores


@_forward.register_fake
def _(hidden_ND: Tensor, *flat: Any) -> Vectors:
    return empty_scores(hidden_ND, flat[5])
