"""How responses are sampled: their distribution, what is recorded of each token, faster layers.

During a rollout adapters are merged into the weights, so that a layer runs one GEMM and not three;
on CPUs, linear layers use a kernel that reads each weight once per token. Both are undone after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.pytorch_utils import Conv1D

from fastppo.errors import UserError
from fastppo.ops.few_rows import few_rows_linear, runs_native, suits

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


class RecordLogprobs(LogitsProcessor):
    """Records the log-prob of each sampled token; only the logits of one step are in memory.

    A token is chosen after this processor has run, so the log-probs of step t are gathered at step
    t + 1. transformers' generate(output_scores=True) keeps the scores of all steps: (T, B, V).
    """

    def __init__(self) -> None:
        self.columns: list[Tensor] = []
        self.pending_BV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.pending_BV is not None:
            self.record_sampled(input_ids[:, -1])
        self.pending_BV = scores
        return scores

    def record_sampled(self, token_B: Tensor) -> None:
        """Record the log-probs of the tokens (B,) that were sampled from the last logits."""
        assert self.pending_BV is not None
        pending = self.pending_BV.float()
        chosen_B = pending.gather(1, token_B[:, None]).squeeze(1)
        self.columns.append(chosen_B - pending.logsumexp(1))
        self.pending_BV = None


class StopStrings(StoppingCriteria):
    """transformers' search for stop strings; records the step at which each row completed one."""

    def __init__(self, tokenizer: Any, strings: tuple[str, ...]) -> None:
        self.search = StopStringCriteria(tokenizer, list(strings))
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        found_B: Tensor = self.search(input_ids, scores)
        self.columns.append(found_B)
        return found_B

    def lengths(self) -> list[int | None]:
        """For each response, the number of tokens up to the one that completes a stop string."""
        rows = torch.stack(self.columns, dim=1).tolist()
        return [row.index(True) + 1 if True in row else None for row in rows]


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
                module.forward = MethodType(few_rows_forward, module)  # type: ignore[method-assign]
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward
