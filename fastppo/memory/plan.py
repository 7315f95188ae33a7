"""The memory plan: what a configuration holds on its device, by role and phase. No torch, no GPU.

accelerate's estimate-memory knows a model's weights and Adam's state: no roles, phases or
activations. docs/memory.md explains the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastppo.memory.inputs import PlanInputs
from fastppo.memory.peaks import PHASES, Peak, Planner
from fastppo.memory.weights import Shapes, StaticBytes

if TYPE_CHECKING:
    from fastppo.config import Config


@dataclass(frozen=True)
class Plan:
    """All peaks of a run, the highest of each phase, and the highest of all."""

    inputs: PlanInputs
    shapes: Shapes
    peaks: tuple[Peak, ...]
    host: dict[str, int]  # what lies in host memory, pinned

    def with_changes(self, **changes: Any) -> Plan:
        """The plan of the same run with some settings changed."""
        return make_plan(replace(self.inputs, **changes), self.shapes)

    @property
    def host_bytes(self) -> int:
        """Pinned host memory of offloaded activations."""
        return self.host.get("activations", 0)

    @property
    def columns(self) -> dict[str, Peak]:
        """Phase -> its highest peak."""
        return {
            phase: max((m for m in self.peaks if m.phase == phase), key=lambda m: m.total)
            for phase in PHASES
            if any(m.phase == phase for m in self.peaks)
        }

    @property
    def peak(self) -> Peak:
        """The highest peak of the run."""
        return max(self.peaks, key=lambda m: m.total)

    @property
    def step_peak(self) -> int:
        """Bytes that tensors take at the highest peak of a step: no reserve, no evaluation."""
        return max(m.total - m.rows.get("reserve", 0) for m in self.peaks if not m.evaluation)

    @property
    def stays_in_rollout(self) -> int:
        """Bytes that a rollout finds taken: every model, adapter and optimiser state, the reserve.

        All that is alive but the cache and what a step of decoding works with.
        """
        comes = ("KV cache", "kept activations", "layer at work", "head chunk")
        return max(
            sum(count for row, count in peak.rows.items() if row not in comes)
            for peak in self.peaks
            if peak.phase == "rollout"
        )

    def fits(self, gpu_bytes: int) -> bool:
        """Whether the whole run, reserve included, fits."""
        return self.peak.total <= gpu_bytes


def uncounted(config: Config) -> str | None:
    """A key that asks for what the plan would miss: embeddings or a head that train whole."""
    kinds = {config.finetuning_type, config.critic_finetuning_type}
    keys = {"additional_target": None} if config.finetuning_type == "lora" else {}
    if "freeze" in kinds:
        keys |= {"freeze_extra_modules": None, "freeze_trainable_modules": "all"}
    return next((key for key, counted in keys.items() if getattr(config, key) != counted), None)


def make_plan(inputs: PlanInputs, shapes: Shapes) -> Plan:
    """The plan of a run on models of these shapes."""
    static = StaticBytes(inputs, shapes)
    planner = Planner(inputs, shapes.base, static)
    host = {"activations": planner.host_bytes(), **static.host}
    return Plan(inputs, shapes, tuple(planner.peaks()), host)
