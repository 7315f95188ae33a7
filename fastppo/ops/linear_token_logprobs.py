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
    entropy_grad: bool = False,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    ignore_index: int = IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> TokenLogprobs:
    r"""`token_logprobs` of the logits h W^T + bias, in nats, without storing them.

    The log-prob is differentiable in the hidden states and in the tensors of the head. Its
    derivative in the hidden state does not depend on the loss:

        J_i = d logprob_i / d hidden_i
            = 1 / tau_i sum_v (1[v = token_i] - p_iv) (1 - tanh^2(x_iv / softcap)) W_v

    So with a frozen weight the forward computes J, (N, D), chunk by chunk, and the backward
    multiplies it by the gradient of each log-prob. Number of GEMMs of N x V x D:

        frozen weight, any loss of the log-probs      2
        with entropy_grad                             1 more
        with a trained bias or head_lora              1 more, which computes the logits again
        trained weight                                4 (`linear_policy_loss` needs 3)
        without gradient                              1

    Operands are multiplied in their own dtype; autocast has no effect.

    Args:
        hidden_ND: float (N, D).
        weight_VD: float (V, D), of the same dtype.
        token_N: int64 (N,), in [0, V), or `ignore_index`: that row gives 0 and no gradient.
        bias_V: float (V,).
        head_lora: an adapter on the head, see HeadLora.
        temperature: > 0, a float or a float tensor () or (N,).
        softcap: > 0, or None for none.
        entropy_grad: whether the entropy is differentiable; if not, it is detached.
        chunk_bytes: largest number of bytes of logits at a time, and with entropy_grad as many for
            their gradient; None is the device's default.
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
    dtype, enabled = logits_dtype_of(op, hidden_ND, logits_dtype), torch.is_grad_enabled()
    tensors = (hidden_ND, *head.tensors())
    wanted = tuple(enabled and tensor is not None and tensor.requires_grad for tensor in tensors)
    given = Arguments(
        hidden_ND, head.arguments(), rows, dtype, chunk_bytes, entropy_grad, wanted, chosen
    )
    if is_traced(hidden_ND):
        logprob_N, entropy_N, *_ = _registered(given)
    elif any(wanted):
        logprob_N, entropy_N = _LinearTokenLogprobs.apply(*tensors, given)  # type: ignore[no-untyped-call]
    else:
        logprob_N, entropy_N, *_ = _forward(given)
    return TokenLogprobs(logprob_N, entropy_N if entropy_grad else entropy_N.detach())


class Arguments(NamedTuple):
    """Arguments of the registered operator; `wanted` is for hidden states, weight, bias, A, B."""

    hidden_ND: Tensor
    head: HeadArguments
    rows: RowArguments
    logits_dtype: torch.dtype
    chunk_bytes: int | None
    entropy_grad: bool
    wanted: tuple[bool, ...]
    backend: str

    @property
    def by_slope(self) -> bool:
        """Whether the forward computes the gradient of the hidden states."""
        hidden, weight, *_ = self.wanted
        return hidden and not weight


class Outputs(NamedTuple):
    """Results of the registered operator: statistics, and slopes, which may be empty."""

    logprob_N: Tensor
    entropy_N: Tensor
    row_max_N: Tensor
    sum_exp_N: Tensor
    logprob_slope_ND: Tensor  # d logprob_i / d hidden_i
    entropy_slope_ND: Tensor


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


def _forward(a: Arguments) -> Outputs:
    stats, kernels = empty_statistics(a.hidden_ND, a.backend), BACKENDS[a.backend]
    slopes = _empty_slopes(a)
    if not a.by_slope:
        _chunks(a, (False,) * 5).visit(
            lambda at, x_NV, _: kernels.token_logprobs(x_NV, a.rows, at, stats), write=False
        )
        return Outputs(*stats, *slopes)
    one_N = torch.ones_like(stats.logprob_N)
    # Only the last one may overwrite the logits.
    derived: list[tuple[Tensor, Tensor | None, Tensor | None]] = [(slopes[0], one_N, None)]
    if a.entropy_grad:
        derived.insert(0, (slopes[1], None, one_N))
    chunks = _chunks(a, (False,) * 5)
    for at, x_NV, dx_NV in chunks.made(a.hidden_ND.dtype, apart=a.entropy_grad):
        assert dx_NV is not None
        kernels.token_logprobs(x_NV, a.rows, at, stats)
        for slope_ND, g_N, h_N in derived:
            kernels.token_logprobs_backward(x_NV, dx_NV, a.rows, at, stats, g_N, h_N)
            chunks.to_hidden(dx_NV, slope_ND[at])
    return Outputs(*stats, *slopes)


def _empty_slopes(a: Arguments) -> tuple[Tensor, Tensor]:
    """Memory for d logprob / d hidden and d entropy / d hidden; empty if not wanted."""
    shape, like = a.hidden_ND.shape, a.hidden_ND
    return (
        like.new_empty(shape if a.by_slope else 0),
        like.new_empty(shape if a.by_slope and a.entropy_grad else 0),
    )


def _backward(a: BackwardArguments) -> HeadGradients:
    """The wanted gradients; the logits are computed again, chunk by chunk."""
    chunks, kernels = _chunks(a, a.wanted), BACKENDS[a.backend]

    def kernel(at: slice, x_NV: Tensor, out_NV: Tensor | None) -> None:
        assert out_NV is not None
        kernels.token_logprobs_backward(x_NV, out_NV, a.rows, at, a.stats, a.g_N, a.h_N)

    chunks.visit(kernel, write=True)
    return chunks.results()


def _save(ctx: Any, a: Arguments, found: Outputs) -> None:
    rows, head, tau = a.rows, a.head, a.rows.temperature
    ctx.softcap, ctx.ignore_index, ctx.scaling = rows.softcap, rows.ignore_index, head.lora_scaling
    ctx.logits_dtype, ctx.chunk_bytes, ctx.backend = a.logits_dtype, a.chunk_bytes, a.backend
    ctx.by_slope, ctx.entropy_grad = a.by_slope, a.entropy_grad
    # Without these the backward cannot compute the logits again; with slopes it need not.
    again = not a.by_slope or any(a.wanted[1:])
    by_tensor = isinstance(tau, Tensor)  # autograd saves tensors
    ctx.temperature = None if by_tensor else tau
    operands = (a.hidden_ND, head.weight_VD, head.bias_V, head.lora_A_RD, head.lora_B_VR)
    ctx.save_for_backward(
        rows.token_N,
        tau if by_tensor else None,
        *(operands if again else (None,) * len(operands)),
        *found,
    )


def _gradients(ctx: Any, g_N: Tensor | None, h_N: Tensor | None) -> tuple[Tensor | None, ...]:
    token_N, tau, hidden_ND, weight_VD, bias_V, a_RD, b_VR, *found = ctx.saved_tensors
    tau = ctx.temperature if tau is None else tau
    rows, outputs = RowArguments(token_N, tau, ctx.softcap, ctx.ignore_index), Outputs(*found)
    wanted = tuple(bool(needed) for needed in ctx.needs_input_grad[:5])
    grads: tuple[Tensor | None, ...] = (None,) * 5
    h_N = h_N if ctx.entropy_grad else None
    d_hidden_ND = None
    if ctx.by_slope and wanted[0]:
        d_hidden_ND = _times_slopes(rows, outputs, g_N, h_N)
        wanted = (False, *wanted[1:])
    if any(wanted):
        given = BackwardArguments(
            g_N,
            h_N,
            wanted,
            hidden_ND,
            HeadArguments(weight_VD, bias_V, a_RD, b_VR, ctx.scaling),
            rows,
            ctx.logits_dtype,
            ctx.chunk_bytes,
            Statistics(*outputs[:4]),
            ctx.backend,
        )
        backward = _registered_backward if is_traced(hidden_ND) else _backward
        grads = asked(wanted, backward(given))
    return grads if d_hidden_ND is None else (d_hidden_ND, *grads[1:])


def _times_slopes(
    rows: RowArguments, found: Outputs, g_N: Tensor | None, h_N: Tensor | None
) -> Tensor | None:
    """g dlogprob/dhidden + h dentropy/dhidden in float32, cast to the dtype of the slopes."""
    # The slopes of ignored rows are 0, but 0 times a NaN in their gradient is NaN.
    dead_N = ~live_rows(rows)
    products = [
        slope_ND * grad_N.masked_fill(dead_N, 0)[:, None]
        for slope_ND, grad_N in ((found.logprob_slope_ND, g_N), (found.entropy_slope_ND, h_N))
        if grad_N is not None
    ]
    if not products:
        return None
    return sum(products[1:], products[0]).to(found.logprob_slope_ND.dtype)


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
        found = _forward(a)
        ctx.set_materialize_grads(False)
        _save(ctx, a, found)
        return found.logprob_N, found.entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_N: Tensor | None, h_N: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, g_N, h_N), None)


_registered = register(
    "linear_token_logprobs",
    Arguments,
    Outputs,
    _forward,
    lambda a: Outputs(*empty_statistics(a.hidden_ND, a.backend), *_empty_slopes(a)),
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
