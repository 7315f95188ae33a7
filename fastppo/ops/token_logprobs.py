"""Log-probs of sampled tokens, and entropies of their distributions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops.arguments import (
    IGNORE_INDEX,
    RowArguments,
    check_floating,
    chosen_backend,
    is_traced,
    row_arguments,
    stat_dtype,
)
from fastppo.ops.backends import BACKENDS, Statistics
from fastppo.ops.registered import register
from fastppo.ops.workspace import fresh_like


class TokenLogprobs(NamedTuple):
    """Log-probs of the sampled tokens and entropies, (N,), in nats; 0 on ignored rows."""

    logprob_N: Tensor
    entropy_N: Tensor


def token_logprobs(
    logits_NV: Tensor,
    token_N: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> TokenLogprobs:
    r"""Log-prob of each sampled token and entropy of each row, in nats; both differentiable.

        z = softcap tanh(x / softcap) / temperature
        logprob = z[token] - log sum exp z,    entropy = - sum p log p

    A loss can be built from these two; its gradient reaches the logits.

    Args:
        logits_NV: float (N, V), any strides; -inf is masked vocabulary.
        token_N: int64 (N,), in [0, V), or `ignore_index`: that row is not read, gives 0 and no
            gradient.
        temperature: > 0, a float or a float tensor () or (N,); no gradient flows to it.
        softcap: > 0, or None for none.
        check: whether to check the range of tokens, which waits for the device.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        TokenLogprobs(logprob_N, entropy_N), float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes that disagree, a setting out of range, a backend that cannot run.
        TypeError: logits that are not floating point, tokens that are not integers.
    """
    op = "token_logprobs"
    check_floating(op, "logits_NV", logits_NV, ndim=2)
    chosen = chosen_backend(op, backend, logits_NV)
    rows = row_arguments(
        op,
        token_N,
        logits_NV,
        logits_NV.shape[1],
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        check=check,
    )
    given = Arguments(logits_NV, rows, chosen)
    if is_traced(logits_NV):
        logprob_N, entropy_N, *_ = _registered(given)
    elif logits_NV.requires_grad and torch.is_grad_enabled():
        logprob_N, entropy_N = _TokenLogprobs.apply(logits_NV, given)  # type: ignore[no-untyped-call]
    else:
        logprob_N, entropy_N, *_ = _forward(given)
    return TokenLogprobs(logprob_N, entropy_N)


class Arguments(NamedTuple):
    """Arguments of the registered operator."""

    logits_NV: Tensor
    rows: RowArguments
    backend: str


class BackwardArguments(NamedTuple):
    """Arguments of the registered operator's backward."""

    g_N: Tensor | None
    h_N: Tensor | None
    logits_NV: Tensor
    rows: RowArguments
    stats: Statistics
    backend: str


class Gradient(NamedTuple):
    """The result of the backward."""

    grad_NV: Tensor


def empty_statistics(like: Tensor, backend: str) -> Statistics:
    """Uninitialised, for the rows of `like`; results of a registered op share no memory."""
    n, dtype = like.shape[0], stat_dtype(like)
    between = 0 if backend == "torch" else n  # the definition computes them again
    a, b, c, d = (like.new_empty(size, dtype=dtype) for size in (n, n, between, between))
    return Statistics(a, b, c, d)


def _forward(a: Arguments) -> Statistics:
    stats = empty_statistics(a.logits_NV, a.backend)
    everything = slice(0, a.logits_NV.shape[0])
    BACKENDS[a.backend].token_logprobs(a.logits_NV, a.rows, everything, stats)
    return stats


def _backward(a: BackwardArguments) -> Gradient:
    """The gradient of the logits, in one pass; nothing else of size N x V is allocated."""
    grad_NV, everything = fresh_like(a.logits_NV), slice(0, a.logits_NV.shape[0])
    kernels = BACKENDS[a.backend]
    kernels.token_logprobs_backward(a.logits_NV, grad_NV, a.rows, everything, a.stats, a.g_N, a.h_N)
    return Gradient(grad_NV)


def _save(ctx: Any, a: Arguments, stats: Statistics) -> None:
    rows, tau = a.rows, a.rows.temperature
    ctx.softcap, ctx.ignore_index, ctx.backend = rows.softcap, rows.ignore_index, a.backend
    by_tensor = isinstance(tau, Tensor)  # autograd saves tensors
    ctx.temperature = None if by_tensor else tau
    ctx.save_for_backward(a.logits_NV, rows.token_N, tau if by_tensor else None, *stats)


def _gradients(ctx: Any, g_N: Tensor | None, h_N: Tensor | None) -> tuple[Tensor | None]:
    logits_NV, token_N, tau, *stats = ctx.saved_tensors
    tau = ctx.temperature if tau is None else tau
    rows = RowArguments(token_N, tau, ctx.softcap, ctx.ignore_index)
    given = BackwardArguments(g_N, h_N, logits_NV, rows, Statistics(*stats), ctx.backend)
    backward = _registered_backward if is_traced(logits_NV) else _backward
    return (backward(given).grad_NV,)


class _TokenLogprobs(torch.autograd.Function):
    """Used by eager calls, because torch.library costs more than the kernel."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
        stats = _forward(a)
        ctx.set_materialize_grads(False)
        _save(ctx, a, stats)
        return stats.logprob_N, stats.entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_N: Tensor | None, h_N: Tensor | None) -> tuple[Tensor | None, None]:
        return (*_gradients(ctx, g_N, h_N), None)


_registered = register(
    "token_logprobs",
    Arguments,
    Statistics,
    _forward,
    lambda a: empty_statistics(a.logits_NV, a.backend),
    results=2,
    save=_save,
    backward=_gradients,
)
_registered_backward = register(
    "token_logprobs_backward",
    BackwardArguments,
    Gradient,
    _backward,
    lambda a: Gradient(
        torch.empty_like(a.logits_NV, memory_format=torch.contiguous_format),
    ),
)
