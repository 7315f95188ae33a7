"""How responses are sampled: their distribution, and adapters that are merged for the time of it.

During a rollout adapters are merged into the weights, so that a layer runs one GEMM and not three.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.pytorch_utils import Conv1D

from fastppo.errors import UserError

if TYPE_CHECKING:
    from fastppo.config import Config


@dataclass(frozen=True)
class Sampling:
    """All settings of the sampler; the model's own generation_config is ignored."""

    max_new_tokens: int
    min_new_tokens: int = 0
    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    # These change speed and memory, not the distribution.
    kv_cache_gib: float | None = None
    merge_adapter: bool | None = None
    cache_implementation: str = "dynamic"

    @classmethod
    def of(cls, config: Config) -> Sampling:
        """The settings that the configuration asks for."""
        return cls(
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            do_sample=config.do_sample,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            repetition_penalty=config.repetition_penalty,
            kv_cache_gib=config.rollout_kv_cache_gib,
            merge_adapter=config.rollout_merge_adapter,
            cache_implementation=config.cache_implementation,
        )

    def check(self, device: torch.device) -> None:
        """Raise UserError for settings that the device cannot run."""
        if self.cache_implementation == "static" and device.type != "cuda":
            raise UserError(
                "cache_implementation: static is for decoding that is compiled, on a CUDA device, "
                "and there is none; leave it out"
            )

    @property
    def truncates(self) -> list[str]:
        """Names of the settings that make the sampler's distribution differ from the policy's."""
        off = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "do_sample": True}
        return [name for name, value in off.items() if getattr(self, name) != value]

    def processors(self) -> list[LogitsProcessor]:
        """transformers' logits processors for these settings, in transformers' order."""
        chain: list[LogitsProcessor] = []
        if self.repetition_penalty != 1.0:
            chain.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.do_sample and self.temperature != 1.0:
            chain.append(TemperatureLogitsWarper(self.temperature))
        if self.do_sample and self.top_k > 0:
            chain.append(TopKLogitsWarper(self.top_k))
        if self.do_sample and self.top_p < 1.0:
            chain.append(TopPLogitsWarper(self.top_p))
        return chain


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
