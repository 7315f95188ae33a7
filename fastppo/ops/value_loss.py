"""The critic's loss, clipped around the values of the rollout."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops import checks
from fastppo.ops.backend import choose, token_kernels


class ValueMetrics(NamedTuple):
    """Sums over the live tokens, 0-d tensors: add with `merge`, divide by `count` at the end.

    Explained variance is 1 - var(return - value) / var(return): the first from error_sum and the
    difference of the two plain sums, the second from return_square_sum and return_sum.
    """

    count: Tensor  # type: ignore[assignment]  # tuple's own count() gives way
    clipped_sum: Tensor  # tokens whose gradient the clip cut: the clipped error is the larger
    error_sum: Tensor  # squared error of the value before the clip
    value_sum: Tensor
    return_sum: Tensor
    return_square_sum: Tensor

    def merge(self, other: ValueMetrics) -> ValueMetrics:
        """Metrics of two batches together."""
        return ValueMetrics(*(a + b for a, b in zip(self, other, strict=True)))


class ValueLoss(NamedTuple):
    """A scalar, differentiable in the values, and detached metrics."""

    loss: Tensor
    metrics: ValueMetrics


def value_loss(
    value_N: Tensor,
    old_value_N: Tensor,
    return_N: Tensor,
    weight_N: Tensor,
    *,
    clip: float | None = 0.2,
    backend: str | None = None,
) -> ValueLoss:
    r"""Half the weighted squared error of the values, the larger of it and its clipped twin.

        1/2 sum_i w_i max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)

    Args:
        value_N: float (N,), V of the state before each token; differentiable.
        old_value_N: float (N,), the same at rollout.
        return_N: float (N,).
        weight_N: float (N,), mask and aggregation in one; tokens of weight 0 are not read.
        clip: c > 0, in the reward's units; None is the plain squared error.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        ValueLoss(loss, metrics), float32 (float64 where an input is).

    Raises:
        ValueError: shapes that disagree, clip not above 0.
        TypeError: inputs that hold no floats.

    Source: Huang et al. 2022, The 37 Implementation Details of PPO, detail 9.
    """
    op = "value_loss"
    checks.floating(op, "value_N", value_N, ndim=1)
    n = value_N.numel()
    for name, tensor in (
        ("old_value_N", old_value_N),
        ("return_N", return_N),
        ("weight_N", weight_N),
    ):
        checks.row_vector(op, name, tensor, value_N, n=n)
    if clip is not None and not clip > 0:
        raise ValueError(f"{op}: clip must be > 0 or None, came {clip}")
    chosen = choose(op, backend, value_N, old_value_N, return_N, weight_N)
    rest = (old_value_N.detach(), return_N.detach(), weight_N.detach())
    loss, vector, _ = torch.ops.fastppo.value_loss(value_N, *rest, clip, chosen)
    return ValueLoss(loss, ValueMetrics(*vector.detach().unbind(0)))


@torch.library.custom_op(
    "fastppo::value_loss",
    mutates_args=(),
    schema="(Tensor value_N, Tensor old_value_N, Tensor return_N, Tensor weight_N, float? clip, "
    "str backend) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    value_N: Tensor,
    old_value_N: Tensor,
    return_N: Tensor,
    weight_N: Tensor,
    clip: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, the vector of metrics, and dloss/dvalue."""
    if backend != "torch":
        found: tuple[Tensor, Tensor, Tensor] = token_kernels(backend).value_loss(
            value_N, old_value_N, return_N, weight_N, clip
        )
        return found
    dtype = checks.stat_dtype(value_N, old_value_N, return_N, weight_N)
    live_N = weight_N != 0
    # where before the arithmetic: a NaN behind weight 0 would come back through 0 * NaN.
    value_N, old_N, goal_N, weight_N = (
        torch.where(live_N, x, 0).to(dtype) for x in (value_N, old_value_N, return_N, weight_N)
    )
    error_N = (value_N - goal_N).square()
    worst_N, slope_N = error_N, value_N - goal_N
    clipped_N = torch.zeros_like(live_N)
    if clip is not None:
        held_N = torch.minimum(torch.maximum(value_N, old_N - clip), old_N + clip)
        held_error_N = (held_N - goal_N).square()
        clipped_N = live_N & (held_error_N > error_N)
        worst_N = torch.where(clipped_N, held_error_N, error_N)
        # Where the clipped error is the larger one, the value was clipped: no gradient.
        slope_N = slope_N.masked_fill(clipped_N, 0)
    metrics = ValueMetrics(
        count=live_N.sum(),
        clipped_sum=clipped_N.sum(),
        error_sum=error_N.sum(),
        value_sum=value_N.sum(),
        return_sum=goal_N.sum(),
        return_square_sum=goal_N.square().sum(),
    )
    vector = torch.stack([x.to(dtype) for x in metrics])
    return (weight_N * worst_N).sum() / 2, vector, weight_N * slope_N


@_forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    value_N, *others = inputs[:4]
    dtype = checks.stat_dtype(value_N, *others)
    sizes: tuple[tuple[Any, ...], ...] = ((), (len(ValueMetrics._fields),), (value_N.shape[0],))
    loss, vector, grad_N = (value_N.new_empty(size, dtype=dtype) for size in sizes)
    return loss, vector, grad_N


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[2])


@once_differentiable
def _autograd(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    (grad_N,) = ctx.saved_tensors
    return ((grad_loss * grad_N).to(ctx.dtype), *[None] * 5)


_forward.register_autograd(_autograd, setup_context=_setup_context)
