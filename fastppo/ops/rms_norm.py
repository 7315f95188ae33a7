"""RMS norm on a CPU in one pass forward and one backward; in PyTorch they are six and ten."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops.native_library import LIBRARY


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x weight / sqrt(mean(x^2) + eps) over the last dimension, with gradients.

    Args:
        x: float32 (..., D), on the CPU.
        weight_D: float32, contiguous.
        eps: added to the mean of squares.

    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, eq. 4.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        result: Tensor = RmsNorm.apply(x, weight_D, eps)  # type: ignore[no-untyped-call]
        return result
    return forward(x, weight_D, eps)


def forward(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The norm, without a gradient."""
    x = x.contiguous()
    out, size = torch.empty_like(x), weight_D.numel()
    LIBRARY.fastppo_rms_norm(
        x.data_ptr(), weight_D.data_ptr(), eps, x.numel() // size, size, out.data_ptr()
    )
    return out


class RmsNorm(torch.autograd.Function):
    """`rms_norm`; it keeps its input, from which the backward computes the factors of rows anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return forward(x, weight_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D = ctx.saved_tensors
        x, grad = x.contiguous(), grad.contiguous()
        size, d_x, d_weight_D = weight_D.numel(), None, None
        if ctx.needs_input_grad[0]:
            d_x = torch.empty_like(x)
            LIBRARY.fastppo_rms_norm_backward(
                grad.data_ptr(),
                x.data_ptr(),
                weight_D.data_ptr(),
                ctx.eps,
                x.numel() // size,
                size,
                d_x.data_ptr(),
            )
        if ctx.needs_input_grad[1]:
            factor_N = (x.square().mean(-1) + ctx.eps).rsqrt().flatten()
            d_weight_D = (grad * x).view(-1, size).T @ factor_N
        return d_x, d_weight_D, None
