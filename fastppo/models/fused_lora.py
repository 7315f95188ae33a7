"""LoRA's linear layer with its own backward: PEFT's GEMMs without PEFT's elementwise passes.

PEFT scales the adapter's output in one pass over memory and adds it to the base's output in
another, in forward and backward. Here the adapter's GEMM adds its result to the base's output.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LoraInputs(torch.autograd.Function):
    r"""x A^T; saves the operands of the layer's backward before the layer's large GEMM runs.

    Activation checkpointing stops recomputing a block as soon as the last saved tensor exists. In
    most blocks the last linear layer saves it, so that layer's output is not computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, a_RD: Tensor, b_VR: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """x A^T (N, R), and an empty tensor with the shape of the layer's output.

        The gradient of the layer's output arrives here as the gradient of that tensor.
        """
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
    """The layer's output; it saves nothing and passes its gradient on to `LoraInputs`."""

    @staticmethod
    def forward(ctx: Any, place_NV: Tensor, *operands: Any) -> Tensor:
        return lora_output(*operands)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor | None, ...]:
        return grad_NV, None, None, None, None, None, None


def scaled_mm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * a @ b in one GEMM, rounded once."""
    return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=scaling)


def lora_output(
    x_ND: Tensor,
    low_NR: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    b_VR: Tensor,
    scaling: float,
) -> Tensor:
    """x W^T + b + scaling * low B^T; the adapter's GEMM adds to the base's output in place."""
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
    r"""y (N, V) = x W^T + b + scaling (x A^T) B^T, with gradients for x, A and B only.

    Args:
        x_ND: the layer's input x, float (N, D); all operands have its dtype.
        weight_VD: W, float (V, D).
        bias_V: b, float (V,), or None.
        a_RD: A, float (R, D).
        b_VR: B, float (V, R).
        scaling: LoRA's alpha / rank.

    Source: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, eq. 3.
    """
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, a_RD, b_VR))):
        return lora_output(x_ND, x_ND @ a_RD.T, weight_VD, bias_V, b_VR, scaling)
    low_NR, place_NV = LoraInputs.apply(x_ND, weight_VD, a_RD, b_VR, scaling)
    operands = (x_ND.detach(), low_NR, weight_VD, bias_V, b_VR.detach(), scaling)
    return LoraOutput.apply(place_NV, *operands)


def fusable_adapter(layer: PeftLinear, x: Tensor) -> str | None:
    """Name of the adapter if `lora_linear` can compute this layer on `x`, else None.

    It can if one plain LoRA adapter is active on a frozen linear layer and all dtypes agree.
    """
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
    """Whether autocast is active in the dtype of `x`, and `x` has several tokens per row.

    A decoding step (one token per row) is left to PEFT: there autocast caches its casts of the
    adapters from step to step, while this forward casts them each time.
    """
    kind = x.device.type
    computes = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == x.dtype
    return computes and x.ndim > 1 and x.shape[-2] > 1


def forward(layer: PeftLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's output, by `lora_linear` if that can compute it, else by PEFT's own forward."""
    name = None if args or kwargs else fusable_adapter(layer, x)
    if name is None:
        return PeftLinear.forward(layer, x, *args, **kwargs)
    base, scaling = layer.get_base_layer(), layer.scaling[name]
    a_RD = layer.lora_A[name].weight.to(x.dtype)
    b_VR = layer.lora_B[name].weight.to(x.dtype)
    out_NV = lora_linear(x.flatten(0, -2), base.weight, base.bias, a_RD, b_VR, scaling)
    return out_NV.view(*x.shape[:-1], -1)


def fuse_lora_layers(model: nn.Module) -> None:
    """Give every LoRA layer of `model` this forward; call it again after adding adapters."""
    for module in model.modules():
        if type(module) is PeftLinear:
            module.forward = MethodType(forward, module)
