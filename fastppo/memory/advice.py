"""Choose values for `auto` keys, and find the fewest changes that make a run fit into memory.

Both results are settings: key -> value as in the YAML. An `auto` key has a list of candidates, the
fastest first. For a run that does not fit there is a list of reductions: each changes some keys so
that the run needs less memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastppo.memory.inputs import ASSUMED, AUTO_KEYS
from fastppo.memory.plan import Plan
from fastppo.memory.units import MIB

MIN_CHUNK_BYTES = 16 * MIB
NOT_WITH_FSDP = {"activation_offloading", "quantization_bit"}
MIN_LENGTH = 256  # lengths are not reduced below this: that would be a different task
Settings = dict[str, Any]
# A function from a plan to settings that reduce its memory; empty if it cannot reduce anything.
Reduction = Callable[[Plan], Settings]


def format_settings(settings: Settings) -> str:
    """Settings as on the command line: `key=value key=value`."""
    words = {True: "true", False: "false"}
    return " ".join(
        f"{key}={words[value] if isinstance(value, bool) else value}"
        for key, value in settings.items()
    )


@dataclass(frozen=True)
class AdviceStep:
    """Settings to change together, and the peak in bytes after this and all earlier steps."""

    settings: Settings
    peak: int


@dataclass(frozen=True)
class Advice:
    """The steps in their order; `fits` says whether the run fits after all of them."""

    steps: tuple[AdviceStep, ...]
    fits: bool

    @property
    def settings(self) -> Settings:
        """The settings of all steps together."""
        return {key: value for step in self.steps for key, value in step.settings.items()}


def halve_micro_batch(plan: Plan) -> Settings:
    """Halve the micro-batch and double the accumulation: the optimiser step stays the same."""
    config = plan.inputs.config
    if config.ppo_max_token_len_per_gpu is not None:
        rows, length = plan.inputs.update_batch
        return {"ppo_max_token_len_per_gpu": rows // 2 * length} if rows > 1 else {}
    rows, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if rows % 2:
        return {}
    return {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": 2 * steps}


def halve_scoring_batch(plan: Plan) -> Settings:
    """Halve the number of sequences in a scoring pass."""
    rows, length = plan.inputs.score_batch
    return {"log_prob_max_token_len_per_gpu": rows // 2 * length} if rows > 1 else {}


def halve_generation_batch(plan: Plan) -> Settings:
    """Halve the number of sequences that are sampled at a time."""
    rows = plan.inputs.rollout_rows
    return {"generation_batch": rows // 2} if rows > 1 else {}


def halve(key: str, least: int) -> Reduction:
    """A reduction that halves a count, down to `least`."""

    def reduction(plan: Plan) -> Settings:
        value = getattr(plan.inputs.config, key)
        return {key: max(least, value // 2)} if value > least else {}

    return reduction


def shorten(key: str) -> Reduction:
    """A reduction that halves a length, down to MIN_LENGTH, and reduces token budgets with it."""

    def reduction(plan: Plan) -> Settings:
        inputs = plan.inputs
        value = getattr(inputs.config, key)
        if value <= MIN_LENGTH:
            return {}
        settings: Settings = {key: max(MIN_LENGTH, value // 2)}
        longest = inputs.with_changes(**settings).longest_sequence
        for budget in ("ppo_max_token_len_per_gpu", "log_prob_max_token_len_per_gpu"):
            tokens = getattr(inputs.config, budget)
            if tokens is not None:
                settings[budget] = tokens * longest // inputs.longest_sequence
        return settings

    return reduction


def set_to(key: str, value: Any) -> Reduction:
    """A reduction that sets a key to one value."""
    return lambda plan: {} if getattr(plan.inputs.config, key) == value else {key: value}


def sleep_between_rollouts(plan: Plan) -> Settings:
    """Have vLLM beside the trainer leave the GPU between rollouts."""
    possible = plan.inputs.colocates and plan.inputs.device == "gpu"
    sleeps = plan.inputs.config.vllm_enable_sleep_mode
    return {"vllm_enable_sleep_mode": True} if possible and not sleeps else {}


def own_sampler(plan: Plan) -> Settings:
    """Sample by the trainer, whose base is the one that trains."""
    return {"use_vllm": False} if plan.inputs.colocates else {}


def quantize(bits: int) -> Reduction:
    """A reduction that quantises the base, unless it trains or adapters are merged into it.

    vLLM beside the trainer loads the base as it is.
    """

    def reduction(plan: Plan) -> Settings:
        config = plan.inputs.config
        merges = plan.inputs.merges_adapters or plan.inputs.colocates
        possible = config.finetuning_type == "lora" and not merges
        fewer = (config.quantization_bit or 16) > bits
        return {"quantization_bit": bits} if possible and fewer else {}

    return reduction


def recompute(plan: Plan) -> Settings:
    """Recompute activations that are kept."""
    if plan.inputs.offload_mode != "none":
        return {}
    asked = plan.inputs.config.disable_gradient_checkpointing is not None
    settings: Settings = {"disable_gradient_checkpointing": False} if asked else {}
    if plan.inputs.config.activation_offloading is not None:
        settings["activation_offloading"] = "checkpoint"
    return settings


def halve_weights(plan: Plan) -> Settings:
    """Models in 16 bits if they are not yet."""
    return {} if plan.inputs.itemsize < 4 else {"bf16": True}


# The first reductions change only the speed, the last ones the training itself.
REDUCTIONS: tuple[Reduction, ...] = (
    halve("per_device_eval_batch_size", 1),
    halve_scoring_batch,
    halve_micro_batch,
    halve_generation_batch,
    recompute,
    sleep_between_rollouts,
    set_to("activation_offloading", "checkpoint+offload"),
    own_sampler,
    halve_weights,
    halve("lora_rank", 8),
    set_to("critic", "shared"),
    quantize(8),
    quantize(4),
    halve("gradient_accumulation_steps", 1),
    shorten("max_new_tokens"),
    shorten("cutoff_len"),
)


def advise(plan: Plan, available_bytes: int, known: Collection[str]) -> Advice:
    """The fewest changes, among `known` keys, with which the run fits into `available_bytes`.

    The first of REDUCTIONS that lowers the peak is applied repeatedly until the run fits. Then
    reductions that turn out not to be needed are undone, starting with the last of REDUCTIONS.
    """
    reduced = reduce_until_it_fits(plan, known, available_bytes)
    if with_reductions(plan, reduced).fits(available_bytes):
        for index in sorted(reduced, reverse=True):
            fewer = {other: settings for other, settings in reduced.items() if other != index}
            if with_reductions(plan, fewer).fits(available_bytes):
                reduced = fewer
    steps, so_far = [], {}
    for index in sorted(reduced):
        so_far[index] = reduced[index]
        peak = with_reductions(plan, so_far).peak.total
        steps.append(AdviceStep(reduced[index], peak))
    return Advice(tuple(steps), with_reductions(plan, reduced).fits(available_bytes))


def reduce_until_it_fits(
    plan: Plan, known: Collection[str], available_bytes: int
) -> dict[int, Settings]:
    """Apply reductions until the run fits or none helps; index in REDUCTIONS -> settings."""
    reduced: dict[int, Settings] = {}
    now = plan
    if plan.inputs.config.shards:
        known = set(known) - NOT_WITH_FSDP
    while not now.fits(available_bytes):
        for index, reduction in enumerate(REDUCTIONS):
            settings = reduction(now)
            if not settings or not set(settings) <= set(known):
                continue
            lower = with_reductions(plan, {**reduced, index: settings})
            if lower.peak.total <= now.peak.total - MIB:
                reduced[index], now = settings, lower
                break
        else:
            break
    return reduced


def with_reductions(plan: Plan, reduced: dict[int, Settings]) -> Plan:
    """The plan with these settings; a reward adapter whose rank is assumed gets the policy's."""
    together = {key: reduced[index][key] for index in sorted(reduced) for key in reduced[index]}
    if "lora_rank" in together and plan.inputs.reward_source.startswith(ASSUMED):
        together["reward_rank"] = together["lora_rank"]
    return plan.with_changes(**together)


def choose_auto(plan: Plan, available_bytes: int) -> Settings:
    """Values for the `auto` keys: the fastest with which the run fits into `available_bytes`.

    If none fits, a key gets the value that takes least memory. Keys are decided in the order of
    AUTO_KEYS; keys that are not yet decided have the value that takes least memory.
    """
    candidates = {key: CANDIDATES[key](plan) for key in AUTO_KEYS if key in plan.inputs.auto}
    chosen: Settings = {key: values[-1] for key, values in candidates.items()}
    for key, values in candidates.items():
        fits = partial(fits_with, plan, available_bytes, chosen, key)
        first = bisect_left(values, True, key=fits)
        chosen[key] = values[min(first, len(values) - 1)]
    return chosen


def choose_offloading(plan: Plan, available_bytes: int) -> Settings:
    """activation_offloading where no key says it: activations are kept if that takes at most half
    of `available_bytes`, whose other half is left to whatever else runs there.
    """
    if not plan.inputs.decides_offloading:
        return {}
    keeps = plan.with_changes(activation_offloading="none").fits(available_bytes // 2)
    return {"activation_offloading": "none" if keeps else "checkpoint"}


def fits_with(plan: Plan, available_bytes: int, chosen: Settings, key: str, value: Any) -> bool:
    """Whether the run fits with the `chosen` settings and `key` set to `value`."""
    return plan.with_changes(**{**chosen, key: value}).fits(available_bytes)


def offload_modes(plan: Plan) -> list[Any]:
    """Modes of activation_offloading; `checkpoint+offload` only on a GPU or with `offload_dir`.

    `offload` is never chosen: it copies about 30 times as much as `checkpoint+offload`.
    """
    config = plan.inputs.config
    has_host = (plan.inputs.device == "gpu" or config.offload_dir) and not config.shards
    return ["none", "checkpoint", *(["checkpoint+offload"] if has_host else [])]


def chunk_sizes(plan: Plan) -> list[Any]:
    """The operators' default and its halves, down to MIN_CHUNK_BYTES."""
    size, sizes = plan.inputs.chunk_bytes, []
    while size >= MIN_CHUNK_BYTES:
        sizes.append(size)
        size //= 2
    return sizes


def token_budgets(plan: Plan) -> list[Any]:
    """Budgets in tokens: from all sequences of an optimiser step at full length down to one."""
    inputs = plan.inputs
    return [rows * inputs.longest_sequence for rows in range(inputs.step_rows, 0, -1)]


def generation_batches(plan: Plan) -> list[Any]:
    """Numbers of sequences sampled at a time: from all of a rollout down to one."""
    return list(range(plan.inputs.rollout_rows, 0, -1))


# Key -> its candidates, from the fastest to the one that takes least memory.
CANDIDATES: dict[str, Callable[[Plan], list[Any]]] = {
    "activation_offloading": offload_modes,
    "chunk_bytes": chunk_sizes,
    "ppo_max_token_len_per_gpu": token_budgets,
    "log_prob_max_token_len_per_gpu": token_budgets,
    "generation_batch": generation_batches,
}
