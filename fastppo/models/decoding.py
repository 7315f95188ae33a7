"""What makes sampling faster for the length of a rollout, and is undone after it.

Adapters merged into the weights: one GEMM a layer where there were three. On CPUs, linear layers
that read each weight once a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastppo.ops.few_rows import few_rows_linear, runs_native, suits


def active_layers(model: nn.Module) -> list[LoraLayer]:
    """LoRA layers of `model` whose adapter is on and whose weight an adapter can be added to."""
    return [
        module
        for module in model.modules()
        if isinstance(module, LoraLayer)
        and not module.disable_adapters
        and isinstance(module.get_base_layer(), nn.Linear | Conv1D)
        and module.get_base_layer().weight.is_floating_point()
        and any(name in module.lora_A for name in module.active_adapters)
    ]


def merged_weight_bytes(model: nn.Module) -> int:
    """Bytes of the merged copies, which lie in memory beside the original weights."""
    return sum(layer.get_base_layer().weight.nbytes for layer in active_layers(model))


def merge_is_exact(model: nn.Module) -> bool:
    """Whether the weights' dtype can hold what an adapter adds to them; False without adapters.

    bfloat16 has 8 significant bits: what is below about 1/500 of a weight is rounded away, and in
    the first hundred steps an adapter adds nothing larger.
    """
    layers = active_layers(model)
    dtypes = {layer.get_base_layer().weight.dtype for layer in layers}
    return bool(layers) and dtypes <= {torch.float32, torch.float64}


def merge_layer(layer: LoraLayer) -> None:
    """Replace the layer's weight by a copy with the adapter added; one GEMM for a plain adapter.

    PEFT's own merge makes the product, adds it, and (with safe_merge) looks for NaN in all of it:
    on a CPU that takes as long as sampling several tokens.
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
    """Merge the active adapters into copies of the weights; put the originals back at the end.

    PEFT's unmerge subtracts what merge added, which leaves a rounding error behind: a run's base
    would drift a little with every rollout. The originals come back bit for bit.
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
            for name in layer.active_adapters:  # DoRA caches its norms for PEFT's unmerge
                layer._caches.pop(f"{name}-weight_norm", None)


def few_rows_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """y = x W^T + b: the native kernel for as few rows as a decoding step has, else PyTorch's."""
    if suits(x, layer.weight):
        return few_rows_linear(x, layer.weight, layer.bias)
    return nn.functional.linear(x, layer.weight, layer.bias)


@contextmanager
def use_few_rows_kernels(model: nn.Module) -> Iterator[None]:
    """Give every plain linear layer of `model` `few_rows_forward`; its own again at the end.

    Where there is no native kernel (a GPU, FASTPPO_BACKEND=torch) nothing changes.
    """
    changed: list[Any] = []
    try:
        module: Any
        for module in model.modules():
            # Streaming replaces a layer's forward with one that brings its weight: leave that.
            if type(module) is nn.Linear and "forward" not in vars(module):
                if not runs_native(module.weight):
                    continue
                module.forward = MethodType(few_rows_forward, module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward
