"""vLLM beside the trainer: what it takes of the device, and of host memory while it sleeps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastppo.memory.inputs import PlanInputs
from fastppo.memory.shapes import ModelShape


@dataclass(frozen=True)
class EngineMemory:
    """Memory of the engine of `vllm_mode: colocate`, in bytes on each device.

    Attributes:
        weights: its copy of the base, and room for an adapter.
        sequence: its cache of the longest sequence.
        tokens: of that sequence.
        share: vllm_gpu_memory_utilization of the device; None if no size is known.
        utilization: that key.
        sleeps: whether between rollouts the weights are in host memory, and the cache is gone.
    """

    weights: int
    sequence: int
    tokens: int
    share: int | None
    utilization: float
    sleeps: bool

    @classmethod
    def of(cls, inputs: PlanInputs, shape: ModelShape) -> EngineMemory | None:
        """The engine of a run whose base has this `shape`; None if vLLM is not beside it."""
        if not inputs.colocates:
            return None
        config, item = inputs.config, inputs.itemsize
        adapter = shape.lora_parameters(inputs.actor_rank, "all", None)
        token = 2 * shape.kv_heads * shape.head_dim * item * shape.layers
        split, utilization = config.vllm_tensor_parallel_size, config.vllm_gpu_memory_utilization
        size = inputs.card_bytes
        return cls(
            weights=-(-(shape.parameters + adapter) * item // split),
            sequence=-(-inputs.longest_sequence * token // split),
            tokens=inputs.longest_sequence,
            share=None if size is None else int(utilization * size),
            utilization=utilization,
            sleeps=config.vllm_enable_sleep_mode,
        )

    @property
    def least(self) -> int:
        """What it cannot start without: the weights, and the cache of one sequence."""
        return self.weights + self.sequence

    @property
    def starts(self) -> bool:
        """Whether its share of the device holds that; true if no size is known."""
        return self.share is None or self.share >= self.least

    def rows(self, phase: str) -> dict[str, int]:
        """Row -> bytes on the device in a phase; its cache takes all of its share that is left."""
        if self.sleeps and phase not in ("load", "rollout"):
            return {}
        cache = max(self.sequence, (self.share or 0) - self.weights)
        return {"vLLM weights": self.weights, "vLLM cache": cache}

    def line(self, size: int | None, unit: int, label: str) -> str:
        """What it takes, or why it does not start and what to set."""
        least, weights = self.least / unit, self.weights / unit
        holds = (
            f"its copy of the base is {weights:.2f} {label}, the cache of a sequence of "
            f"{self.tokens} tokens {self.sequence / unit:.2f}"
        )
        key = f"vllm_gpu_memory_utilization: {self.utilization:g}"
        if size is None or self.share is None:
            return f"vLLM beside the trainer takes at least {least:.2f} {label}: {holds}"
        share = f"{key} is {self.share / unit:.2f} {label}"
        if self.starts:
            return f"vLLM beside the trainer: {share}; {holds}"
        needed = math.ceil(100 * self.least / size) / 100
        cure = f"set it to {needed:g}" if needed <= 1 else "no share of this card holds it"
        return f"vLLM beside the trainer does not start: {holds}, and {share}; {cure}"
