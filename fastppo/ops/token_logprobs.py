"""Log-prob of the sampled token and entropy of the distribution it came from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops import checks
from fastppo.ops.arguments import RowArguments, row_arguments
from fastppo.ops.backend import choose
from fastppo.ops.rows import (
    DenseRows,
)
from fastppo.ops.sweep import Statistics, visit_gradient, visit_statistics
from fastppo.ops.workspace import fresh_like


class TokenLogprobs(NamedTuple):
    """Log-prob of the sampled token and entropy, (N,), in nats; 0 on ignored rows."""

    logprob_N: Tensor
    entropy_N: Tensor


def token_logprobs(
    logits_NV: Tensor,
    token_N: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = checks.IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> TokenLogprobs:
    r"""Log-prob of each sampled token and entropy of each row, in nats; both differentiable.

        z = softcap tanh(x / softcap) / temperature
        logprob = z[token] - log sum exp z,    entropy = - sum p log p

    Any loss of these two can be built on top of it: its gradient passes through.

    Args:
        logits_NV: float (N, V), any strides; -inf is masked vocabulary.
        token_N: int64 (N,), in [0, V), or `ignore_index`: that row is not read, gives 0 and no
            gradient.
        temperature: > 0, a float or a float tensor () or (N,); no gradient flows to it.
        softcap: > 0, or None for none.
        check: also refuse tokens out of range; waits for the device.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        TokenLogprobs(logprob_N, entropy_N), float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes that disagree, a setting out of range, a backend that cannot run.
        TypeError: logits that hold no floats, tokens that hold no integers.
    """
    op = "token_logprobs"
    checks.floating(op, "logits_NV", logits_NV, ndim=2)
    chosen = choose(op, backend, logits_NV)
    n, vocab = logits_NV.shape
    checks.tokens(op, token_N, logits_NV, n=n, vocab=vocab, ignore_index=ignore_index, check=check)
    checks.temperature(op, temperature, logits_NV, n=n)
    checks.softcap(op, softcap)
    rows = row_arguments(token_N, temperature, softcap, ignore_index)
    outputs = torch.ops.fastppo.token_logprobs(logits_NV, *rows.flat(), chosen)
    return TokenLogprobs(outputs[0], outputs[1])


@torch.library.custom_op(
    "fastppo::token_logprobs",
    mutates_args=(),
    schema=f"(Tensor logits_NV, {RowArguments.SCHEMA}, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(logits_NV: Tensor, *flat: Any) -> Statistics:
    """Log-prob, entropy, and two vectors between this op and its backward."""
    *values, backend = flat
    rows = RowArguments(*values)
    live_N = rows.token_N != rows.ignore_index
    return visit_statistics(DenseRows(logits_NV), rows, logits_NV, backend, live_N=live_N)


def fake_statistics(like: Tensor, backend: str) -> Statistics:
    """The shapes of `Statistics`."""
    n, dtype = like.shape[0], checks.stat_dtype(like)
    between = 0 if backend == "torch" else n
    sizes = (n, n, between, between)
    return tuple(like.new_empty(size, dtype=dtype) for size in sizes)  # type: ignore[return-value]


@_forward.register_fake
def _(logits_NV: Tensor, *flat: Any) -> Statistics:
    return fake_statistics(logits_NV, flat[-1])


@torch.library.custom_op(
    "fastppo::token_logprobs_backward",
    mutates_args=(),
    schema=f"(Tensor? g_N, Tensor? h_N, Tensor logits_NV, {RowArguments.SCHEMA}, "
    "Tensor logprob_N, Tensor entropy_N, Tensor highest_N, Tensor total_N, str backend) -> Tensor",
)
def _backward(g_N: Tensor | None, h_N: Tensor | None, logits_NV: Tensor, *flat: Any) -> Tensor:
    """One sweep: the gradient of the logits; nothing else of size N x V is made."""
    rows, stats, backend = RowArguments(*flat[:5]), flat[5:9], flat[9]
    grad_NV = fresh_like(logits_NV)
    live_N = rows.token_N != rows.ignore_index
    visited = DenseRows(logits_NV, grad_NV)
    visit_gradient(visited, rows, logits_NV, backend, stats, g_N, h_N, live_N=live_N)
    return grad_NV


@_backward.register_fake
def _(g_N: Tensor | None, h_N: Tensor | None, logits_NV: Tensor, *flat: Any) -> Tensor:
    return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Statistics) -> None:
    logits_NV, token_N, tau, *ctx.settings, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_NV, token_N, tau, *output)


@once_differentiable
def _autograd(ctx: Any, g_N: Tensor | None, h_N: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if not ctx.needs_input_grad[0]:
        return (None,) * 7
    logits_NV, token_N, tau, *stats = ctx.saved_tensors
    grad_NV = torch.ops.fastppo.token_logprobs_backward(
        g_N, h_N, logits_NV, token_N, tau, *ctx.settings, *stats, ctx.backend
    )
    return (grad_NV, *[None] * 6)


_forward.register_autograd(_autograd, setup_context=_setup_context)
