"""Log-prob and entropy straight from hidden states; the logits of a batch never exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops import checks
from fastppo.ops.arguments import RowArguments, row_arguments
from fastppo.ops.backend import choose
from fastppo.ops.config import HeadLora
from fastppo.ops.head import (
    CHUNK_SCHEMA,
    HEAD_SCHEMA,
    Head,
    LinearRows,
    asked,
    check_head,
    fake_results,
    logits_dtype_of,
)
from fastppo.ops.sweep import Statistics, visit_gradient, visit_statistics
from fastppo.ops.token_logprobs import (
    TokenLogprobs,
    fake_statistics,
)


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
    ignore_index: int = checks.IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> TokenLogprobs:
    r"""`token_logprobs` of logits = h W^T + bias, in nats, without ever holding them.

    Differentiable in the hidden states and in whatever of the head asks for a gradient: one GEMM
    without a gradient; with one, the backward makes the logits again (three GEMMs, four for a
    trained head). Where the loss is PPO's, `linear_policy_loss` needs two and three. Operands are
    multiplied in the dtype they have; autocast is not consulted.

    Args:
        hidden_ND: float (N, D).
        weight_VD: float (V, D), of the same dtype.
        token_N: int64 (N,), in [0, V), or `ignore_index`: that row gives 0 and no gradient.
        bias_V: float (V,).
        head_lora: an adapter on the head, see HeadLora.
        temperature: > 0, a float or a float tensor () or (N,).
        softcap: > 0, or None for none.
        chunk_bytes: how many bytes of logits may exist at a time; None suits the device.
        logits_dtype: what the GEMM gives; None is the operands' dtype, float32 keeps what bf16
            rounds.
        check: also refuse tokens out of range; waits for the device.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        TokenLogprobs(logprob_N, entropy_N), float32 (float64 for float64 hidden states).

    Raises:
        ValueError: shapes that disagree, a setting out of range, a backend that cannot run.
        TypeError: inputs of the wrong kind, hidden states and weight of two dtypes.
    """
    op = "linear_token_logprobs"
    head = Head(weight_VD, bias_V, head_lora)
    check_head(op, hidden_ND, head)
    chosen = choose(op, backend, hidden_ND)
    n, vocab = hidden_ND.shape[0], weight_VD.shape[0]
    checks.tokens(op, token_N, hidden_ND, n=n, vocab=vocab, ignore_index=ignore_index, check=check)
    checks.temperature(op, temperature, hidden_ND, n=n)
    checks.softcap(op, softcap)
    rows = row_arguments(token_N, temperature, softcap, ignore_index)
    dtype = logits_dtype_of(op, hidden_ND, logits_dtype)
    outputs = torch.ops.fastppo.linear_token_logprobs(
        hidden_ND, *head.flat(), *rows.flat(), dtype, chunk_bytes, chosen
    )
    return TokenLogprobs(outputs[0], outputs[1])


@torch.library.custom_op(
    "fastppo::linear_token_logprobs",
    mutates_args=(),
    schema=f"(Tensor hidden_ND, {HEAD_SCHEMA}, {RowArguments.SCHEMA}, {CHUNK_SCHEMA}, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(hidden_ND: Tensor, *flat: Any) -> Statistics:
    """Log-prob, entropy, and two vectors between this op and its backward."""
    head, rows = Head.of(flat[:5]), RowArguments(*flat[5:10])
    logits_dtype, chunk_bytes, backend = flat[10:]
    live_N = rows.token_N != rows.ignore_index
    stat = checks.stat_dtype(hidden_ND)
    visited = LinearRows(hidden_ND, head, stat, logits_dtype, chunk_bytes, live_N)
    return visit_statistics(visited, rows, hidden_ND, backend, live_N=live_N)


@_forward.register_fake
def _(hidden_ND: Tensor, *flat: Any) -> Statistics:
    return fake_statistics(hidden_ND, flat[-1])


@torch.library.custom_op(
    "fastppo::linear_token_logprobs_backward",
    mutates_args=(),
    schema=f"(Tensor? g_N, Tensor? h_N, bool[] wanted, Tensor hidden_ND, {HEAD_SCHEMA}, "
    f"{RowArguments.SCHEMA}, {CHUNK_SCHEMA}, Tensor logprob_N, Tensor entropy_N, "
    "Tensor highest_N, Tensor total_N, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    g_N: Tensor | None, h_N: Tensor | None, wanted: list[bool], hidden_ND: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    """Gradients of hidden states, weight, bias, A and B; empty where not wanted."""
    head, rows = Head.of(flat[:5]), RowArguments(*flat[5:10])
    logits_dtype, chunk_bytes, *stats, backend = flat[10:]
    live_N = rows.token_N != rows.ignore_index
    stat = checks.stat_dtype(hidden_ND)
    visited = LinearRows(hidden_ND, head, stat, logits_dtype, chunk_bytes, live_N, wanted)
    visit_gradient(visited, rows, hidden_ND, backend, tuple(stats), g_N, h_N, live_N=live_N)
    return visited.results()


@_backward.register_fake
def _(
    g_N: Tensor | None, h_N: Tensor | None, wanted: list[bool], hidden_ND: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    return fake_results(hidden_ND, Head.of(flat[:5]), wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Statistics) -> None:
    hidden_ND, weight_VD, bias_V, a_RD, b_VR, scaling, token_N, tau, *rest = inputs
    ctx.scaling, ctx.rest, ctx.backend = scaling, rest[:-1], rest[-1]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_ND, weight_VD, bias_V, a_RD, b_VR, token_N, tau, *output)


@once_differentiable
def _autograd(ctx: Any, g_N: Tensor | None, h_N: Tensor | None, *_: Any) -> tuple[Any, ...]:
    hidden_ND, weight_VD, bias_V, a_RD, b_VR, token_N, tau, *stats = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:5])
    grads = torch.ops.fastppo.linear_token_logprobs_backward(
        g_N,
        h_N,
        wanted,
        hidden_ND,
        weight_VD,
        bias_V,
        a_RD,
        b_VR,
        ctx.scaling,
        token_N,
        tau,
        *ctx.rest,
        *stats,
        ctx.backend,
    )
    return (*asked(wanted, grads), *[None] * 9)


_forward.register_autograd(_autograd, setup_context=_setup_context)
