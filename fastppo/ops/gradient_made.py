"""A loss whose gradient was computed in the forward: what its backward does with it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops.arguments import LossArguments, is_traced
from fastppo.ops.backends import BACKENDS


class LossOutputs(NamedTuple):
    """The outputs of a loss besides gradients; `metrics` are PolicyMetrics as one vector."""

    loss: Tensor
    logprob_N: Tensor
    entropy_N: Tensor
    kl_N: Tensor
    metrics: Tensor


def save_settings(ctx: Any, loss: LossArguments, backend: str) -> None:
    """Save on autograd's context what `scaled` needs."""
    ctx.scale, ctx.backend, ctx.taken = loss.grad_scale, backend, False


def scaled(
    op: str, ctx: Any, grads: tuple[Tensor | None, ...], grad_loss: Tensor
) -> tuple[Tensor | None, ...]:
    """The forward's gradients times grad_loss / grad_scale, which is usually 1.

    They are scaled in place, so a second backward is an error (except with the definition). With
    factor 1 no pass over memory is made; on a GPU the device decides that, not the host.
    """
    made = [grad for grad in grads if grad is not None]
    if made and is_traced(made[0]):
        factor = grad_loss / ctx.scale
        return tuple(None if grad is None else (grad * factor).to(grad.dtype) for grad in grads)
    if ctx.backend == "torch":
        factor = grad_loss / ctx.scale
        if factor.device.type == "cpu" and factor.item() == 1.0:
            return grads
        return tuple(None if grad is None else grad * factor for grad in grads)
    if ctx.taken:
        raise RuntimeError(
            f"{op}: a second backward, whose gradient the first one took; call {op} again"
        )
    ctx.taken = True
    for grad in made:
        BACKENDS[ctx.backend].scale_unless_one(grad.detach(), grad_loss, ctx.scale)
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
        made = cls.apply(op, outputs, grads, loss, backend, *leaves)  # type: ignore[no-untyped-call]
        return outputs._replace(loss=made)

    @staticmethod
    def forward(
        ctx: Any,
        op: str,
        outputs: LossOutputs,
        grads: tuple[Tensor | None, ...],
        loss: LossArguments,
        backend: str,
        *leaves: Tensor | None,
    ) -> Tensor:
        ctx.op = op
        save_settings(ctx, loss, backend)
        ctx.save_for_backward(*grads)
        return outputs.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None,) * 5, *scaled(ctx.op, ctx, ctx.saved_tensors, grad_loss))
