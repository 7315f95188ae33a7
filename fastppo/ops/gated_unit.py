"""silu(gate) up on a CPU in one pass forward and one backward; in PyTorch they are two and four."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops.native_library import LIBRARY


def gated_unit(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with gradients; it keeps `gate` and `up`, and not silu(gate).

    Args:
        gate: float32 (..., D), on the CPU.
        up: float32 (..., D).

    Source: Shazeer 2020, GLU Variants Improve Transformer, eq. 5 (SwiGLU).
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        result: Tensor = GatedUnit.apply(gate, up)  # type: ignore[no-untyped-call]
        return result
    return forward(gate, up)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """The unit, without a gradient."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    LIBRARY.fastppo_gated_unit(gate.data_ptr(), up.data_ptr(), gate.numel(), out.data_ptr())
    return out


class GatedUnit(torch.autograd.Function):
    """`gated_unit` with its backward, which computes the sigmoid anew."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (x.contiguous() for x in ctx.saved_tensors)
        grad, d_gate, d_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        LIBRARY.fastppo_gated_unit_backward(
            grad.data_ptr(),
            gate.data_ptr(),
            up.data_ptr(),
            gate.numel(),
            d_gate.data_ptr(),
            d_up.data_ptr(),
        )
        return d_gate, d_up
