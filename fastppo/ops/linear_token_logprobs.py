"""Log-probs and entropies directly from hidden states; the logits of a batch are never stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops.arguments import (
    IGNORE_INDEX,
    RowArguments,
    chosen_backend,
    is_traced,
    live_rows,
    row_arguments,
    stat_dtype,
)
from fastppo.ops.backends import BACKENDS, Statistics
from fastppo.ops.config import HeadLora
from fastppo.ops.head import (
    Head,
    HeadArguments,
    HeadGradients,
    LinearRows,
    asked,
    check_head,
    fake_results,
    logits_dtype_of,
)
from fastppo.ops.registered import register
from fastppo.ops.token_logprobs import TokenLogprobs, empty_statistics


def linear_token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    token_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    head_lora: HeadLora | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    ignore_index: int = IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> TokenLogprobs:
    r"""`token_logprobs` of the logits h W^T + bias, in nats, without storing them.

    Differentiable in the hidden states and in the tensors of the head. Without gradient it is one
    GEMM; with gradient the backward computes the logits again: three GEMMs, or four for a trained
    head (`linear_policy_loss` needs two and three). Operands are multiplied in their own dtype;
    autocast has no effect.

    Args:
        hidden_ND: float (N, D).
        weight_VD: float (V, D), of the same dtype.
        token_N: int64 (N,), in [0, V), or `ignore_index`: that row gives 0 and no gradient.
        bias_V: float (V,).
        head_lora: an adapter on the head, see HeadLora.
        temperature: > 0, a float or a float tensor () or (N,).
        softcap: > 0, or None for none.
        chunk_bytes: largest number of bytes of logits at a time; None is the device's default.
        logits_dtype: dtype of the GEMM's result; None is the operands' dtype, float32 avoids the
            rounding to bf16.
        check: whether to check the range of tokens, which waits for the device.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        TokenLogprobs(logprob_N, entropy_N), float32 (float64 for float64 hidden states).

    Raises:
        ValueError: shapes that disagree, a setting out of range, a backend that cannot run.
        TypeError: inputs of the wrong kind, hidden states and weight of different dtypes.
    """
    op = "linear_token_logprobs"
    head = Head(weight_VD, bias_V, head_lora)
    check_head(op, hidden_ND, head)
    chosen = chosen_backend(op, backend, hidden_ND)
    rows = row_arguments(
        op,
        token_N,
        hidden_ND,
        weight_VD.shape[0],
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        check=check,
    )
    dtype = logits_dtype_of(op, hidden_ND, logits_dtype)
    given = Arguments(hidden_ND, head.arguments(), rows, dtype, chunk_bytes, chosen)
    tensors = (hidden_ND, *head.tensors())
    if is_traced(hidden_ND):
        logprob_N, entropy_N, *_ = _registered(given)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        logprob_N, entropy_N = _LinearTokenLogprobs.apply(*tensors, given)  # type: ignore[no-untyped-call]
    else:
        logprob_N, entropy_N, *_ = _forward(given)
    return TokenLogprobs(logprob_N, entropy_N)


class Arguments(NamedTuple):
    """Arguments of the registered operator."""

    hidden_ND: Tensor
    head: HeadArguments
    rows: RowArguments
    logits_dtype: torch.dtype
    chunk_bytes: int | None
    backend: str


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


def _chunks(a: Arguments | BackwardArguments, wanted: tuple[bool, ...]) -> LinearRows:
    head, live_N = Head.of(a.head).detach(), live_rows(a.rows)
    hidden_ND, stat = a.hidden_ND.detach(), stat_dtype(a.hidden_ND)
    return LinearRows(hidden_ND, head, stat, a.logits_dtype, a.chunk_bytes, live_N, wanted)


def _forward(a: Arguments) -> Statistics:
    stats, kernels = empty_statistics(a.hidden_ND, a.backend), BACKENDS[a.backend]
    _chunks(a, (False,) * 5).visit(
        lambda at, x_NV, _: kernels.token_logprobs(x_NV, a.rows, at, stats), write=False
    )
    return stats


def _backward(a: BackwardArguments) -> HeadGradients:
    """The wanted gradients; the logits are computed again, chunk by chunk."""
    chunks, kernels = _chunks(a, a.wanted), BACKENDS[a.backend]

    def kernel(at: slice, x_NV: Tensor, out_NV: Tensor | None) -> None:
        assert out_NV is not None
        kernels.token_logprobs_backward(x_NV, out_NV, a.rows, at, a.stats, a.g_N, a.h_N)

    chunks.visit(kernel, write=True)
    return chunks.results()


def _save(ctx: Any, a: Arguments, stats: Statistics) -> None:
    rows, head, tau = a.rows, a.head, a.rows.temperature
    ctx.softcap, ctx.ignore_index, ctx.scaling = rows.softcap, rows.ignore_index, head.lora_scaling
    ctx.logits_dtype, ctx.chunk_bytes, ctx.backend = a.logits_dtype, a.chunk_bytes, a.backend
    by_tensor = isinstance(tau, Tensor)  # autograd saves tensors
    ctx.temperature = None if by_tensor else tau
    ctx.save_for_backward(
        a.hidden_ND,
        head.weight_VD,
        head.bias_V,
        head.lora_A_RD,
        head.lora_B_VR,
        rows.token_N,
        tau if by_tensor else None,
        *stats,
    )


def _gradients(ctx: Any, g_N: Tensor | None, h_N: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden_ND, weight_VD, bias_V, a_RD, b_VR, token_N, tau, *stats = ctx.saved_tensors
    tau = ctx.temperature if tau is None else tau
    wanted = tuple(bool(needed) for needed in ctx.needs_input_grad[:5])
    given = BackwardArguments(
        g_N,
        h_N,
        wanted,
        hidden_ND,
        HeadArguments(weight_VD, bias_V, a_RD, b_VR, ctx.scaling),
        RowArguments(token_N, tau, ctx.softcap, ctx.ignore_index),
        ctx.logits_dtype,
        ctx.chunk_bytes,
        Statistics(*stats),
        ctx.backend,
    )
    backward = _registered_backward if is_traced(hidden_ND) else _backward
    return asked(wanted, backward(given))


class _LinearTokenLogprobs(torch.autograd.Function):
    """The eager call, without torch.library's cost."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        lora_A_RD: Tensor | None,
        lora_B_VR: Tensor | None,
        a: Arguments,
    ) -> tuple[Tensor, Tensor]:
        stats = _forward(a)
        ctx.set_materialize_grads(False)
        _save(ctx, a, stats)
        return stats.logprob_N, stats.entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_N: Tensor | None, h_N: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, g_N, h_N), None)


_registered = register(
    "linear_token_logprobs",
    Arguments,
    Statistics,
    _forward,
    lambda a: empty_statistics(a.hidden_ND, a.backend),
    results=2,
    save=_save,
    backward=_gradients,
)
_registered_backward = register(
    "linear_token_logprobs_backward",
    BackwardArguments,
    HeadGradients,
    _backward,
    lambda a: fake_results(a.hidden_ND, Head.of(a.head), a.wanted),
)
