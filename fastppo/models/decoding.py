"""Changes to a model that make sampling faster; they are undone after the rollout.

Adapters are merged into the weights, so that a layer runs one GEMM and not three. On CPUs, linear
layers use a kernel that reads each weight once per token.
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
    """LoRA layers of `model` with an active adapter that can be merged into the layer's weight."""
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
    """Bytes of the merged copies, which are in memory in addition to the original weights."""
    return sum(layer.get_base_layer().weight.nbytes for layer in active_layers(model))


def merge_is_exact(model: nn.Module) -> bool:
    """Whether merging loses no precision; False without adapters.

    bfloat16 has 8 significant bits: it rounds away changes below about 1/500 of a weight, and in
    the first hundred steps an adapter makes no larger ones.
    """
    layers = active_layers(model)
    dtypes = {layer.get_base_layer().weight.dtype for layer in layers}
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


def few_rows_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """y = x W^T + b: by the native kernel if x has few rows, as in decoding, else by PyTorch."""
    if suits(x, layer.weight):
        return few_rows_linear(x, layer.weight, layer.bias)
    return nn.functional.linear(x, layer.weight, layer.bias)


@contextmanager
def use_few_rows_kernels(model: nn.Module) -> Iterator[None]:
    """Inside the block every plain linear layer of `model` runs `few_rows_forward`.

    Without a native kernel (on a GPU, with FASTPPO_BACKEND=torch) nothing changes.
    """
    changed: list[Any] = []
    try:
        module: Any
        for module in model.modules():
            # A streamed layer has a forward of its own, which copies its weight: leave it.
            if type(module) is nn.Linear and "forward" not in vars(module):
                if not runs_native(module.weight):
                    continue
                module.forward = MethodType(few_rows_forward, module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward
