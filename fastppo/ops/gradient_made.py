"""A loss whose gradient was computed in the forward: what its backward does with it.

Eager calls keep the gradient in `GradientMade`. A registered operator gives it out as an output,
which its backward must not overwrite: a tracer has seen the values. So the output has no elements.
It is of shape (0, *gradient), and owns the gradient's memory (`donated`); the operator
`scale_donated` takes that memory over, and gives it out, scaled where the factor is not 1. With the
gradient itself as the output, a traced backward would be one more pass over [N, V]: torch.compile
copies what a backward is given before it lets an operator write to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.ops.arguments import LossArguments, is_traced, once_differentiable
from fastppo.ops.backends import BACKENDS
from fastppo.ops.registered import register


class LossOutputs(NamedTuple):
    """The outputs of a loss besides gradients; `metrics` are PolicyMetrics as one vector."""

    loss: Tensor
    logprob_N: Tensor
    entropy_N: Tensor
    kl_N: Tensor
    metrics: Tensor


def save_settings(ctx: Any, loss: LossArguments, backend: str) -> None:
    """Save on autograd's context what `scaled` needs."""
    ctx.scale, ctx.backend = loss.grad_scale, backend


def scaled(
    op: str, ctx: Any, grads: tuple[Tensor | None, ...], grad_loss: Tensor
) -> tuple[Tensor | None, ...]:
    """The forward's gradients times grad_loss / grad_scale, which is usually 1.

    They are scaled in place, so a second backward is an error (except with the definition). With
    factor 1 no pass over memory is made; on a GPU the device decides that, not the host.
    """
    if is_traced(grad_loss):
        factor = grad_loss / ctx.scale
        return tuple(None if grad is None else (grad * factor).to(grad.dtype) for grad in grads)
    if ctx.backend == "torch":
        factor = grad_loss / ctx.scale
        if factor.device.type == "cpu" and factor.item() == 1.0:
            return grads
        return tuple(None if grad is None else grad * factor for grad in grads)
    if getattr(ctx, "taken", False):
        raise RuntimeError(
            f"{op}: a second backward, whose gradient the first one took; call {op} again"
        )
    ctx.taken = True
    for grad in grads:
        if grad is not None:
            BACKENDS[ctx.backend].scale_unless_one(grad, grad_loss, ctx.scale)
    return grads


class GradientMade(torch.autograd.Function):
    """A loss whose gradients for `leaves` were computed in the forward; None if unwanted.

    Eager calls of both losses use it, because torch.library costs more than the kernel.
    """

    @classmethod
    def of(
        cls,
        op: str,
        outputs: LossOutputs,
        grads: tuple[Tensor | None, ...],
        loss: LossArguments,
        backend: str,
        leaves: tuple[Tensor | None, ...],
    ) -> LossOutputs:
        """The outputs with a loss that autograd knows as a function of `leaves`."""
        made = cls.apply((op, outputs.loss, grads, loss, backend), *leaves)  # type: ignore[no-untyped-call]
        return LossOutputs(made, *outputs[1:])

    @staticmethod
    def forward(
        ctx: Any,
        given: tuple[str, Tensor, tuple[Tensor | None, ...], LossArguments, str],
        *leaves: Tensor | None,
    ) -> Tensor:
        ctx.op, total, grads, loss, backend = given
        save_settings(ctx, loss, backend)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *scaled(ctx.op, ctx, ctx.saved_tensors, grad_loss))


def donated(grad: Tensor, backend: str) -> Tensor:
    """The gradient as a tensor of no elements that owns its memory; see the head of the module.

    The definition's is given as it is, so that a second backward finds it.
    """
    if backend == "torch":
        return grad
    grad = grad.contiguous()
    return grad.new_empty(0).set_(  # type: ignore[no-any-return, call-overload]
        grad.untyped_storage(), grad.storage_offset(), (0, *grad.shape)
    )


def fake_donated(grad: Tensor, backend: str) -> Tensor:
    """A tensor with the shape of the result of `donated`."""
    return grad if backend == "torch" else grad.new_empty((0, *grad.shape))


def scaled_donated(
    ctx: Any, grads: tuple[Tensor | None, ...], grad_loss: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients that the forward gave to `donated`, times grad_loss / grad_scale."""
    if ctx.backend == "torch":
        factor = grad_loss / ctx.scale
        return tuple(None if grad is None else (grad * factor).to(grad.dtype) for grad in grads)
    return tuple(
        None
        if grad is None
        else _scale_donated(DonatedArguments(grad, grad_loss, ctx.scale, ctx.backend)).grad
        for grad in grads
    )


class DonatedArguments(NamedTuple):
    """Arguments of the registered operator; `donated` is a result of that function."""

    donated: Tensor
    grad_loss: Tensor
    scale: float | Tensor
    backend: str


class Gradient(NamedTuple):
    """The result of the registered operator."""

    grad: Tensor


def _forward(a: DonatedArguments) -> Gradient:
    donated, shape = a.donated, a.donated.shape[1:]
    storage, start = donated.untyped_storage(), donated.storage_offset()
    if storage.nbytes() < (start + shape.numel()) * donated.element_size():
        raise RuntimeError(
            "fastppo.ops: the gradient that a traced loss made in its forward was not saved: hooks "
            "on saved tensors (save_on_cpu, offloading) copy elements, and it is kept without any; "
            "call the loss outside of them"
        )
    # The memory goes over to the result. A second backward is an error, which autograd finds by
    # the version of what it saved.
    torch.autograd.graph.increment_version(donated)
    donated.set_(donated.new_empty(0).untyped_storage(), 0, donated.shape)  # type: ignore[call-overload]
    grad = donated.new_empty(0).set_(storage, start, shape)  # type: ignore[call-overload]
    BACKENDS[a.backend].scale_unless_one(grad, a.grad_loss, a.scale)
    return Gradient(grad)


_scale_donated = register(
    "scale_donated",
    DonatedArguments,
    Gradient,
    _forward,
    lambda a: Gradient(a.donated.new_empty(a.donated.shape[1:])),
)
