"""LoRA's linear layer with a backward of its own: PEFT's GEMMs, and no passes over memory besides.

PEFT scales what an adapter says in one pass over the layer's output and adds it in another, and its
backward does as much again. Here the adapter's GEMM adds to the base's output as it writes.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LoraInputs(torch.autograd.Function):
    r"""x A^T, and the whole backward of the layer, saved before its own GEMM runs.

    Checkpointing that computes a block anew stops at the last tensor that it has to save again. In
    most blocks that is what the last layer saves, so what comes behind is not computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, a_RD: Tensor, b_VR: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """x A^T (N, R); and what has the output's shape, not its memory, to take its gradient."""
        low_NR = x_ND @ a_RD.T
        ctx.save_for_backward(x_ND, weight_VD, a_RD, b_VR, low_NR)
        ctx.scaling = scaling
        ctx.mark_non_differentiable(low_NR)
        return low_NR, x_ND.new_empty(1).expand(len(x_ND), len(weight_VD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad_NV: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_VD, a_RD, b_VR, low_NR = ctx.saved_tensors
        d_low_NR = scaled_mm(grad_NV, b_VR, ctx.scaling)
        d_x_ND = None
        if ctx.needs_input_grad[0]:
            d_x_ND = (grad_NV @ weight_VD).addmm_(d_low_NR, a_RD)
        d_a_RD = d_low_NR.T @ x_ND if ctx.needs_input_grad[2] else None
        d_b_VR = scaled_mm(grad_NV.T, low_NR, ctx.scaling) if ctx.needs_input_grad[3] else None
        return d_x_ND, None, d_a_RD, d_b_VR, None


class LoraOutput(torch.autograd.Function):
    """The layer's output; it saves nothing, and hands its gradient to `LoraInputs`."""

    @staticmethod
    def forward(ctx: Any, place_NV: Tensor, *operands: Any) -> Tensor:
        return lora_output(*operands)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor | None, ...]:
        return grad_NV, None, None, None, None, None, None


def scaled_mm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """s a b, rounded once."""
    return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=scaling)


def lora_output(
    x_ND: Tensor,
    low_NR: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    b_VR: Tensor,
    scaling: float,
) -> Tensor:
    """The base's output, to which the adapter's GEMM adds as it writes."""
    out_NV = nn.functional.linear(x_ND, weight_VD, bias_V)
    return out_NV.addmm_(low_NR, b_VR.T, alpha=scaling)


def lora_linear(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    a_RD: Tensor,
    b_VR: Tensor,
    scaling: float,
) -> Tensor:
    r"""y = x W^T + b + s (x A^T) B^T of x (N, D), W (V, D), A (R, D), B (V, R); W and b are frozen.

    Source: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, eq. 3.
    """
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, a_RD, b_VR))):
        return lora_output(x_ND, x_ND @ a_RD.T, weight_VD, bias_V, b_VR, scaling)
    low_NR, place_NV = LoraInputs.apply(x_ND, weight_VD, a_RD, b_VR, scaling)
    operands = (x_ND.detach(), low_NR, weight_VD, bias_V, b_VR.detach(), scaling)
    return LoraOutput.apply(place_NV, *operands)


def fusable_adapter(layer: PeftLinear, x: Tensor) -> str | None:
    """The adapter, where this layer is a plain LoRA of one adapter in one dtype; else None."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    base = layer.get_base_layer()
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias.get(name):
        return None
    dropout = layer.lora_dropout[name]
    plain = isinstance(dropout, nn.Identity) or dropout.p == 0.0
    frozen = type(base) is nn.Linear and not base.weight.requires_grad
    if not (plain and frozen and x.dtype == base.weight.dtype):
        return None
    alike = layer.lora_A[name].weight.dtype == x.dtype
    return name if alike or autocasts(x) else None


def autocasts(x: Tensor) -> bool:
    """Whether autocast would compute in the dtype that `x` and the base are in.

    A step of decoding, one token a row, is left to autocast: it keeps its copies of the adapters,
    where this makes them anew.
    """
    kind = x.device.type
    computes = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == x.dtype
    return computes and x.ndim > 1 and x.shape[-2] > 1


def forward(layer: PeftLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of PEFT's, which does what this does not."""
    name = None if args or kwargs else fusable_adapter(layer, x)
    if name is None:
        return PeftLinear.forward(layer, x, *args, **kwargs)
    base, scaling = layer.get_base_layer(), layer.scaling[name]
    a_RD = layer.lora_A[name].weight.to(x.dtype)
    b_VR = layer.lora_B[name].weight.to(x.dtype)
    out_NV = lora_linear(x.flatten(0, -2), base.weight, base.bias, a_RD, b_VR, scaling)
    return out_NV.view(*x.shape[:-1], -1)


def fuse_lora_layers(model: nn.Module) -> None:
    """Give every LoRA layer of `model` this forward; again after adapters were added to others."""
    for module in model.modules():
        if type(module) is PeftLinear:
            module.forward = MethodType(forward, module)
