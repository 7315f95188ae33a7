"""The memory plan: what a run keeps on its device, by role and phase. No torch, no GPU.

accelerate's estimate-memory counts only a model's weights and Adam's state, not roles, phases or
activations. docs/memory.md explains the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastppo.config import Config
from fastppo.config.below import base_of
from fastppo.config.memory import micro_batch_tokens
from fastppo.errors import UserError
from fastppo.memory.engine import EngineMemory
from fastppo.memory.inputs import PlanInputs
from fastppo.memory.peak import ENGINE_ROWS, PHASES, Peak
from fastppo.memory.peaks import Planner
from fastppo.memory.shapes import ModelShape, find_shape_and_source, from_config
from fastppo.memory.tape import FLOAT32
from fastppo.memory.weights import Shapes, StaticBytes


@dataclass(frozen=True)
class Plan:
    """The memory plan of a run.

    Attributes:
        inputs: the run that is planned.
        shapes: shapes of the base and of the other models.
        peaks: all points at which memory may be highest.
        host: row -> bytes in host memory.
    """

    inputs: PlanInputs
    shapes: Shapes
    peaks: tuple[Peak, ...]
    host: dict[str, int]

    def with_changes(self, **changes: Any) -> Plan:
        """The plan of the same run with some keys, or some fields of its inputs, changed."""
        return make_plan(self.inputs.with_changes(**changes), self.shapes)

    def for_lengths(self, **lengths: int) -> Plan:
        """The plan if no sequence is longer than `lengths`, by the keys that limit them.

        A micro-batch may have as many tokens as before, and so more sequences.
        """
        config, tokens = self.inputs.config, {}
        if config.stage == "ppo" and config.ppo_max_token_len_per_gpu is None:
            tokens["ppo_max_token_len_per_gpu"] = micro_batch_tokens(config)
        return self.with_changes(**tokens, **lengths)

    @property
    def host_bytes(self) -> int:
        """Bytes of pinned host memory for offloaded activations."""
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
        """Bytes of tensors at the highest peak of a training step, without reserve and vLLM."""
        others = ("reserve", *ENGINE_ROWS)
        return max(
            peak.total - sum(peak.rows.get(row, 0) for row in others)
            for peak in self.peaks
            if not peak.evaluation
        )

    @property
    def stays_in_rollout(self) -> int:
        """Bytes that are taken when a rollout begins: models, adapters, optimiser state, reserve.

        The rest of a rollout's peak is the KV cache and the tensors of a decoding step.
        """
        comes = ("KV cache", "kept activations", "layer at work", "head chunk")
        return max(
            sum(count for row, count in peak.rows.items() if row not in comes)
            for peak in self.peaks
            if peak.phase == "rollout"
        )

    @property
    def engine(self) -> EngineMemory | None:
        """vLLM beside the trainer, or None."""
        return EngineMemory.of(self.inputs, self.shapes.base)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of an optimiser step, which several processes add up."""
        static = StaticBytes(self.inputs, self.shapes)
        return FLOAT32 * (static.actor.parameters + static.critic.parameters)

    def fits(self, available_bytes: int) -> bool:
        """Whether the run, including the reserve, fits into `available_bytes`."""
        return self.peak.total <= available_bytes


def make_plan(inputs: PlanInputs, shapes: Shapes) -> Plan:
    """The plan of a run whose models have these shapes."""
    static = StaticBytes(inputs, shapes)
    planner = Planner(inputs, shapes.base, static)
    activations = planner.activations
    host = {"activations": activations.offloaded_bytes, **static.host}
    if inputs.states_on_host:
        rows = max(inputs.scored_rows, inputs.evaluated_rows)
        host["shared states"] = activations.shared_states(rows)
    if planner.engine is not None and planner.engine.sleeps:
        host["vLLM's weights while it sleeps"] = planner.engine.weights
    return Plan(inputs, shapes, tuple(planner.peaks()), host)


def plan_config(
    config: Config, device: Literal["gpu", "cpu"], gpus: int = 1, card: int | None = None
) -> tuple[Plan, list[str]]:
    """The plan of a configuration for each of `gpus` processes, and lines that say what it assumes.

    `card` is the memory of a GPU in bytes, if it is known.

    Raises:
        UserError: a model's shape is unknown, or a key trains modules that the plan does not count.
    """
    if (key := find_uncounted_key(config)) is not None:
        raise UserError(
            f"{config.source}: {key}: the plan does not count single modules that train whole; "
            "plan without this key"
        )
    base, source = find_base_shape(config)
    inputs = PlanInputs.of(config, base, device=device, gpus=gpus).with_changes(card_bytes=card)
    notes = [f"shape of the base from {source}"]
    others: dict[str, ModelShape] = {}
    for role, name in other_models(config).items():
        given = given_config(config, role)
        others[role], source = (
            find_shape_and_source(name, config.cache_dir)
            if given is None
            else (from_config(given, name), "its config")
        )
        notes.append(f"shape of the {role} ({name}) from {source}")
    if "lora" in inputs.reward_kinds:
        where = inputs.reward_source
        notes.append(f"reward adapter of rank {inputs.reward_rank} ({where})")
    own = "the checkpoint's own on a GPU" if device == "gpu" else "float32 on a CPU"
    asked = [f"{key}: true" for key in ("bf16", "fp16") if getattr(config, key)]
    why = asked[0] if asked else f"bf16 is not set: {own}"
    notes.append(f"base in {inputs.dtype} ({why})")
    if config.stage == "ppo":
        notes.append(
            f"prompts of cutoff_len {config.cutoff_len} tokens, responses of max_new_tokens "
            f"{config.max_new_tokens}, all of them; shorter ones need less"
        )
    else:
        notes.append(f"prompt and answer together cutoff_len {config.cutoff_len} tokens, always")
    return make_plan(inputs, Shapes(base, **others)), notes


def find_base_shape(config: Config) -> tuple[ModelShape, str]:
    """The base's shape and its source: the config of a model that was given, or the files."""
    given = given_config(config, "base")
    if given is not None:
        return from_config(given, config.model_name_or_path), "its config"
    return find_shape_and_source(config.model_name_or_path, config.cache_dir, config.model_revision)


def given_config(config: Config, role: str) -> dict[str, Any] | None:
    """The config.json of a role's model if a program gave it as an object, else None."""
    objects = config.objects
    found = {"base": objects.model, "reference": objects.ref_model, "critic": objects.critic_model}
    if role == "reward":
        full = [spec.target for spec in config.rewards if spec.kind == "full"]
        models = [objects.rewards[name][0] for name in full if name in objects.rewards]
        found[role] = models[-1] if models else None
    model = found[role]
    data: dict[str, Any] | None = None if model is None else model.config.to_dict()
    return data


def find_uncounted_key(config: Config) -> str | None:
    """A key that trains modules which the plan does not count, or None."""
    kinds = {config.finetuning_type, config.critic_finetuning_type}
    counted: dict[str, str | None] = {}
    if config.finetuning_type == "lora":
        counted["additional_target"] = None
    if "freeze" in kinds:
        counted |= {"freeze_extra_modules": None, "freeze_trainable_modules": "all"}
    return next((key for key, value in counted.items() if getattr(config, key) != value), None)


def other_models(config: Config) -> dict[str, str]:
    """Role -> name of the role's model, for models other than the base."""
    found = {spec.kind: spec.target for spec in config.rewards}
    models = {"reward": found["full"]} if "full" in found else {}
    if config.ref_model is not None:
        models["reference"] = config.ref_model
    if config.critic == "model" and config.critic_model is not None:
        models["critic"] = base_of(Path(config.critic_model)) or config.critic_model
    return models
