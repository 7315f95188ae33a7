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


class LoraLinear(torch.autograd.Function):
    r"""y = x W^T + b + s (x A^T) B^T of x (N, D), W (V, D), A (R, D), B (V, R); W and b are frozen.

    Source: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, eq. 3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        a_RD: Tensor,
        b_VR: Tensor,
        scaling: float,
    ) -> Tensor:
        out_NV, low_NR = lora_linear(x_ND, weight_VD, bias_V, a_RD, b_VR, scaling)
        ctx.save_for_backward(x_ND, weight_VD, a_RD, b_VR, low_NR)
        ctx.scaling = scaling
        return out_NV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_VD, a_RD, b_VR, low_NR = ctx.saved_tensors
        d_low_NR = (grad_NV @ b_VR).mul_(ctx.scaling)
        d_x_ND = None
        if ctx.needs_input_grad[0]:
            d_x_ND = (grad_NV @ weight_VD).addmm_(d_low_NR, a_RD)
        d_a_RD = d_low_NR.T @ x_ND if ctx.needs_input_grad[3] else None
        d_b_VR = (grad_NV.T @ low_NR).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        return d_x_ND, None, None, d_a_RD, d_b_VR, None


def lora_linear(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    a_RD: Tensor,
    b_VR: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """The layer's output (N, V) and x A^T (N, R)."""
    low_NR = x_ND @ a_RD.T
    out_NV = nn.functional.linear(x_ND, weight_VD, bias_V)
    return out_NV.addmm_(low_NR, b_VR.T, alpha=scaling), low_NR


def suits(layer: PeftLinear, x: Tensor) -> str | None:
    """The adapter, where this layer is a plain LoRA of one adapter and one dtype; else None."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    base = layer.get_base_layer()
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias.get(name):
        return None
    dropout = layer.lora_dropout[name]
    plain = isinstance(dropout, nn.Identity) or dropout.p == 0.0
    frozen = type(base) is nn.Linear and not base.weight.requires_grad
    dtypes = {x.dtype, base.weight.dtype, layer.lora_A[name].weight.dtype}
    return name if plain and frozen and len(dtypes) == 1 else None


def forward(layer: PeftLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of PEFT's, which does what this does not."""
    name = None if args or kwargs else suits(layer, x)
    if name is None:
        return PeftLinear.forward(layer, x, *args, **kwargs)
    base, a, b = layer.get_base_layer(), layer.lora_A[name].weight, layer.lora_B[name].weight
    operands = (x.flatten(0, -2), base.weight, base.bias, a, b, layer.scaling[name])
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, a, b))
    out_NV = LoraLinear.apply(*operands) if trains else lora_linear(*operands)[0]
    return out_NV.view(*x.shape[:-1], -1)


def fuse(model: nn.Module) -> None:
    """Give every LoRA layer of `model` this forward; again after adapters were added to others."""
    for module in model.modules():
        if type(module) is PeftLinear:
            module.forward = MethodType(forward, module)
