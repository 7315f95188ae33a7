"""For the length of a rollout, adapters as part of the weights: one GEMM a layer and not three.

Afterwards the weights are what they were, bit for bit. PEFT's unmerge subtracts what merge has
added, which rounds: a run's base would drift from rollout to rollout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def active_layers(model: nn.Module) -> list[LoraLayer]:
    """Linear layers with an adapter that is on, of weights that an adapter can be added to."""
    return [
        module
        for module in model.modules()
        if isinstance(module, LoraLayer)
        and not module.disable_adapters
        and isinstance(module.get_base_layer(), nn.Linear)
        and module.get_base_layer().weight.is_floating_point()
        and any(name in module.lora_A for name in module.active_adapters)
    ]


def merge_bytes(model: nn.Module) -> int:
    """What the merged weights take beside those that they stand in for."""
    return sum(layer.get_base_layer().weight.nbytes for layer in active_layers(model))


def loses_nothing(model: nn.Module) -> bool:
    """Whether the weights hold what an adapter adds to them.

    bfloat16 has 8 bits: what is below about 1/500 of a weight is rounded away, and in the first
    hundred steps that is all that an adapter says.
    """
    layers = active_layers(model)
    dtypes = {layer.get_base_layer().weight.dtype for layer in layers}
    return bool(layers) and dtypes <= {torch.float32, torch.float64}


def merge(layer: LoraLayer) -> None:
    """Put a merged copy of the weight in its place, in one pass over it where the adapter is plain.

    PEFT's own way makes the product, adds it, and (with safe_merge) looks at all of it: on a CPU
    that takes as long as sampling several tokens.
    """
    base, names = layer.get_base_layer(), list(layer.active_adapters)
    plain = len(names) == 1 and not layer.lora_variant and not layer.lora_bias.get(names[0])
    if not plain:
        base.weight.data = base.weight.data.clone()
        if base.bias is not None:
            base.bias.data = base.bias.data.clone()
        layer.merge(safe_merge=False, adapter_names=names)
        return
    a_RD, b_VR = layer.lora_A[names[0]].weight.data, layer.lora_B[names[0]].weight.data
    weight_VD = base.weight.data.to(a_RD.dtype)
    sum_VD = torch.addmm(weight_VD, b_VR, a_RD, alpha=layer.scaling[names[0]])
    base.weight.data = sum_VD.to(base.weight.dtype)
    layer.merged_adapters.append(names[0])


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside the block the active adapters are in the weights; after it those are as they were.

    The merged weights are copies. The originals are put back, to the bit: what was added and is
    taken off again leaves its rounding behind, a little more with every rollout.
    """
    kept: list[tuple[LoraLayer, Tensor, Tensor | None]] = []
    try:
        for layer in active_layers(model):
            base = layer.get_base_layer()
            bias = None if base.bias is None else base.bias.data
            kept.append((layer, base.weight.data, bias))
            merge(layer)
        yield
    finally:
        for layer, weight, bias in kept:
            base = layer.get_base_layer()
            base.weight.data = weight
            if bias is not None:
                base.bias.data = bias
            layer.merged_adapters.clear()
            for name in layer.active_adapters:  # DoRA keeps its norms for PEFT's own way back
                layer._caches.pop(f"{name}-weight_norm", None)
