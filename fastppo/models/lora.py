"""LoRA's linear layers in one GEMM: their own backward, and adapters merged for a rollout.

PEFT scales the adapter's output in one pass over memory and adds it to the base's output in
another, in forward and backward. Here the adapter's GEMM adds its result to the base's output.
During a rollout adapters are merged into the weights, so that a layer runs one GEMM and not three.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


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
        # On a CPU three times as fast as grad^T low, whose long side a library packs.
        d_b_VR = scaled_mm(low_NR.T, grad_NV, ctx.scaling).T if ctx.needs_input_grad[3] else None
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


def active_layers(model: nn.Module) -> list[LoraLayer]:
    """LoRA layers of `model` with an active adapter that can be merged into the layer's weight."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [layer for layer in layers if can_be_merged(layer)]


def can_be_merged(layer: LoraLayer) -> bool:
    """Whether the layer has an active adapter, and a weight that it can be merged into."""
    base: Any = layer.get_base_layer()
    return (
        not layer.disable_adapters
        and isinstance(base, nn.Linear | Conv1D)
        and base.weight.is_floating_point()
        and any(name in layer.lora_A for name in layer.active_adapters)
    )


def base_weight(layer: LoraLayer) -> Tensor:
    """The weight of the linear layer that the adapter is on."""
    base: Any = layer.get_base_layer()
    weight: Tensor = base.weight
    return weight


def merged_weight_bytes(model: nn.Module) -> int:
    """Bytes of the merged copies, which are in memory in addition to the original weights."""
    return sum(base_weight(layer).nbytes for layer in active_layers(model))


def merge_is_exact(model: nn.Module) -> bool:
    """Whether merging loses no precision; False without adapters.

    bfloat16 has 8 significant bits: it rounds away changes below about 1/500 of a weight, and in
    the first hundred steps an adapter makes no larger ones.
    """
    layers = active_layers(model)
    dtypes = {base_weight(layer).dtype for layer in layers}
    return bool(layers) and dtypes <= {torch.float32, torch.float64}


def merge_layer(layer: LoraLayer) -> None:
    """Replace the layer's weight by a copy with the adapter merged; one GEMM for a plain adapter.

    PEFT's own merge computes the product, adds it, and (with safe_merge) searches all of it for
    NaN: on a CPU that takes as long as sampling several tokens.
    """
    base: Any = layer.get_base_layer()
    names = list(layer.active_adapters)
    plain = len(names) == 1 and not layer.lora_variant and not layer.lora_bias.get(names[0])
    if not plain:
        base.weight.data = base.weight.data.clone()
        if base.bias is not None:
            base.bias.data = base.bias.data.clone()
        layer.merge(safe_merge=False, adapter_names=names)
        return
    lora_a: Any = layer.lora_A[names[0]]
    lora_b: Any = layer.lora_B[names[0]]
    a_RD, b_VR = lora_a.weight.data, lora_b.weight.data
    weight = base.weight.data.to(a_RD.dtype)  # (V, D), Conv1D's (D, V)
    factors = (a_RD.T, b_VR.T) if isinstance(base, Conv1D) else (b_VR, a_RD)
    merged = torch.addmm(weight, *factors, alpha=layer.scaling[names[0]])
    base.weight.data = merged.to(base.weight.dtype)
    layer.merged_adapters.append(names[0])


@contextmanager
def merge_active_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block the active adapters are merged into copies of the weights.

    At the end the original weights are restored bit for bit. PEFT's unmerge would subtract what
    merge added, which leaves a rounding error: the base would drift with every rollout.
    """
    originals: list[tuple[LoraLayer, Tensor, Tensor | None]] = []
    try:
        for layer in active_layers(model):
            base: Any = layer.get_base_layer()
            originals.append(
                (layer, base.weight.data, None if base.bias is None else base.bias.data)
            )
            merge_layer(layer)
        yield
    finally:
        for layer, weight, bias in originals:
            base = layer.get_base_layer()
            base.weight.data = weight
            if bias is not None:
                base.bias.data = bias
            layer.merged_adapters.clear()
            for name in layer.active_adapters:  # norms that DoRA caches for PEFT's unmerge
                layer._caches.pop(f"{name}-weight_norm", None)
