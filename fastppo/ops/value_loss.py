"""The critic's loss, clipped around the values of the rollout."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.ops.arguments import (
    chosen_backend,
    flat,
    is_traced,
    once_differentiable,
    stat_dtype,
    vector_argument,
)
from fastppo.ops.backends import BACKENDS
from fastppo.ops.checks import check_floating, check_number
from fastppo.ops.metrics import Entry, Metrics
from fastppo.ops.registered import register
from fastppo.ops.shapes import live_tokens


class ValueMetrics(Metrics):
    """Sums over the live tokens, 0-d tensors: add with `merge`, divide by `count` at the end.

    Explained variance is 1 - var(return - value) / var(return). The first variance follows from
    error_sum and the difference of the two plain sums, the second from return_square_sum and
    return_sum.
    """

    count = Entry()
    clipped_sum = Entry()  # number of tokens without gradient, as the clipped error is the larger
    error_sum = Entry()  # squared error of the value before the clip
    value_sum = Entry()
    return_sum = Entry()
    return_square_sum = Entry()


class ValueLoss(NamedTuple):
    """The loss, a scalar that is differentiable in the values, and metrics without gradient."""

    loss: Tensor
    metrics: ValueMetrics


def value_loss(
    value_N: Tensor,
    old_value_N: Tensor,
    return_N: Tensor,
    weight_N: Tensor,
    *,
    mask: Tensor | None = None,
    clip: float | None = 0.2,
    backend: str | None = None,
) -> ValueLoss:
    r"""Half the weighted squared error of the values, with or without clip: the larger for each.

        1/2 sum_i w_i max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)

    Args:
        value_N: float (...), V of the state before each token; differentiable.
        old_value_N: float (...), the same at rollout.
        return_N: float (...).
        weight_N: float (...), mask and aggregation in one; tokens of weight 0 are not read.
        mask: bool, or integers 0 and 1, (...): tokens behind it are not read either.
        clip: c > 0, in the reward's units; None is the plain squared error.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        ValueLoss(loss, metrics), float32 (float64 where an input is).

    Raises:
        ValueError: shapes that disagree, clip not above 0.
        TypeError: inputs that are not floating point.

    Source: Huang et al. 2022, The 37 Implementation Details of PPO, detail 9.
    """
    op = "value_loss"
    if not isinstance(value_N, Tensor) or not value_N.is_floating_point():
        check_floating(op, "value_N", value_N)
    lead = value_N.shape
    old_value_N = vector_argument(op, "old_value_N", old_value_N, value_N, lead)
    return_N = vector_argument(op, "return_N", return_N, value_N, lead)
    weight_N = vector_argument(op, "weight_N", weight_N, value_N, lead)
    if type(clip) is not float:
        check_number(op, "clip", clip, positive=False)
    if clip is not None and not clip > 0:
        raise ValueError(f"{op}: clip must be > 0 or None, came {clip}")
    chosen = chosen_backend(op, backend, value_N, old_value_N, return_N, weight_N)
    if mask is not None:
        live = live_tokens(op, mask, lead, value_N, check=False)
        weight_N = torch.where(flat(live), weight_N, 0)
    value_N = flat(value_N)
    given = Arguments(value_N, old_value_N, return_N, weight_N, clip, chosen)
    if is_traced(value_N):
        loss, vector, _ = _registered(given)
    elif value_N.requires_grad and torch.is_grad_enabled():
        loss, vector = _ValueLoss.apply(value_N, given)  # type: ignore[no-untyped-call]
    else:
        loss, vector, _ = _forward(given)
    return ValueLoss(loss, ValueMetrics(vector))


class Arguments(NamedTuple):
    """Arguments of the registered operator."""

    value_N: Tensor
    old_value_N: Tensor
    return_N: Tensor
    weight_N: Tensor
    clip: float | None
    backend: str


class Outputs(NamedTuple):
    """Outputs of the registered operator; `metrics` are ValueMetrics as one vector."""

    loss: Tensor
    metrics: Tensor
    grad_N: Tensor


def _forward(a: Arguments) -> Outputs:
    given = (a.value_N, a.old_value_N, a.return_N, a.weight_N, a.clip)
    return Outputs(*BACKENDS[a.backend].value_loss(*given))


def _fake(a: Arguments) -> Outputs:
    like, dtype = a.value_N, stat_dtype(a.value_N, a.old_value_N, a.return_N, a.weight_N)
    return Outputs(
        like.new_empty((), dtype=dtype),
        like.new_empty(len(ValueMetrics._fields), dtype=dtype),
        like.new_empty(like.shape[0], dtype=dtype),
    )


def _save(ctx: Any, a: Arguments, outputs: Outputs) -> None:
    ctx.dtype = a.value_N.dtype
    ctx.save_for_backward(outputs.grad_N)


def _gradients(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None]:
    if grad_loss is None:
        return (None,)
    (grad_N,) = ctx.saved_tensors
    return ((grad_loss * grad_N).to(ctx.dtype),)


class _ValueLoss(torch.autograd.Function):
    """Used by eager calls, to avoid torch.library's cost."""

    @staticmethod
    def forward(ctx: Any, value_N: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
        outputs = _forward(a)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs.metrics)
        _save(ctx, a, outputs)
        return outputs.loss, outputs.metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        return (*_gradients(ctx, grad_loss), None)


_registered = register(
    "value_loss", Arguments, Outputs, _forward, _fake, results=1, save=_save, backward=_gradients
)
