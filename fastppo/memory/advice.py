"""From a plan: values for the keys that are `auto`, and the fewest changes that make a run fit.

Both are settings, key -> value as in the YAML. For `auto` each key has candidates, the fastest
first. A run that does not fit goes through reductions, each of which changes some keys so that
memory gets less.
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
MIN_LENGTH = 256  # lengths are not cut below this: it would be another task
Settings = dict[str, Any]
# From the plan of a run the settings that reduce its memory; none where there is nothing to reduce.
Reduction = Callable[[Plan], Settings]


def format_settings(settings: Settings) -> str:
    """Settings as the command line would have them: `key=value key=value`."""
    words = {True: "true", False: "false"}
    return " ".join(
        f"{key}={words[value] if isinstance(value, bool) else value}"
        for key, value in settings.items()
    )


@dataclass(frozen=True)
class AdviceStep:
    """Settings to change together, and the peak once they and all before them are changed."""

    settings: Settings
    peak: int


@dataclass(frozen=True)
class Advice:
    """Steps in the order in which to take them; `fits` is whether they are enough."""

    steps: tuple[AdviceStep, ...]
    fits: bool

    @property
    def settings(self) -> Settings:
        """The settings of all steps together."""
        return {key: value for step in self.steps for key, value in step.settings.items()}


def halve_micro_batch(plan: Plan) -> Settings:
    """Half the micro-batch, and twice as many of them: the same optimiser step."""
    config = plan.inputs.config
    if config.ppo_max_token_len_per_gpu is not None:
        rows, length = plan.inputs.update_batch
        return {"ppo_max_token_len_per_gpu": rows // 2 * length} if rows > 1 else {}
    rows, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if rows % 2:
        return {}
    return {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": 2 * steps}


def halve_scoring_batch(plan: Plan) -> Settings:
    """Half as many sequences in a scoring pass."""
    rows, length = plan.inputs.score_batch
    return {"log_prob_max_token_len_per_gpu": rows // 2 * length} if rows > 1 else {}


def halve_generation_batch(plan: Plan) -> Settings:
    """Half as many sequences sampled at a time."""
    rows = plan.inputs.rollout_rows
    return {"generation_batch": rows // 2} if rows > 1 else {}


def halve(key: str, least: int) -> Reduction:
    """Half of a count, down to `least`."""

    def reduction(plan: Plan) -> Settings:
        value = getattr(plan.inputs.config, key)
        return {key: max(least, value // 2)} if value > least else {}

    return reduction


def shorten(key: str) -> Reduction:
    """Half of a length, down to MIN_LENGTH; budgets in tokens shrink with the longest sequence."""

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
    """One value of a key."""
    return lambda plan: {} if getattr(plan.inputs.config, key) == value else {key: value}


def quantize(bits: int) -> Reduction:
    """Fewer bits for the frozen base; one that trains, or takes a merge, cannot be quantised."""

    def reduction(plan: Plan) -> Settings:
        config = plan.inputs.config
        possible = config.finetuning_type == "lora" and not plan.inputs.merges_adapters
        fewer = (config.quantization_bit or 16) > bits
        return {"quantization_bit": bits} if possible and fewer else {}

    return reduction


def halve_weights(plan: Plan) -> Settings:
    """Models in 16 bits where they are not yet."""
    return {} if plan.inputs.itemsize < 4 else {"bf16": True}


# From what changes nothing but speed to what changes what is learned.
REDUCTIONS: tuple[Reduction, ...] = (
    halve("per_device_eval_batch_size", 1),
    halve_scoring_batch,
    halve_micro_batch,
    halve_generation_batch,
    set_to("disable_gradient_checkpointing", False),
    set_to("activation_offloading", "checkpoint+offload"),
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
    """The fewest settings, of `known` keys, with which the run fits into `available_bytes`.

    The first of REDUCTIONS that lowers the peak is taken, again and again; then those that turned
    out not to be needed are taken back, the last of REDUCTIONS first.
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
    """Index in REDUCTIONS -> settings, until the run fits or no reduction helps."""
    reduced: dict[int, Settings] = {}
    now = plan
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
    """The plan with these settings; an assumed reward adapter follows the policy's rank."""
    together = {key: reduced[index][key] for index in sorted(reduced) for key in reduced[index]}
    if "lora_rank" in together and plan.inputs.reward_source.startswith(ASSUMED):
        together["reward_rank"] = together["lora_rank"]
    return plan.with_changes(**together)


def choose_auto(plan: Plan, available_bytes: int) -> Settings:
    """Values of the keys that are `auto`: the fastest whose plan fits into `available_bytes`, those
    that take least memory where none does.

    Keys are chosen in the order of AUTO_KEYS, while those still open have the value that takes
    least.
    """
    candidates = {key: CANDIDATES[key](plan) for key in AUTO_KEYS if key in plan.inputs.auto}
    chosen: Settings = {key: values[-1] for key, values in candidates.items()}
    for key, values in candidates.items():
        fits = partial(fits_with, plan, available_bytes, chosen, key)
        first = bisect_left(values, True, key=fits)
        chosen[key] = values[min(first, len(values) - 1)]
    return chosen


def fits_with(plan: Plan, available_bytes: int, chosen: Settings, key: str, value: Any) -> bool:
    """Whether the run fits with the chosen settings and one more."""
    return plan.with_changes(**{**chosen, key: value}).fits(available_bytes)


def offload_modes(plan: Plan) -> list[Any]:
    """Modes of activation_offloading; to host memory on a GPU, or if it is a file, only.

    `offload` is never chosen: it moves some 30 times as much as `checkpoint+offload`.
    """
    has_host = plan.inputs.device == "gpu" or plan.inputs.config.offload_dir
    return ["none", "checkpoint", *(["checkpoint+offload"] if has_host else [])]


def chunk_sizes(plan: Plan) -> list[Any]:
    """The operators' own default and halves of it, down to MIN_CHUNK_BYTES."""
    size, sizes = plan.inputs.chunk_bytes, []
    while size >= MIN_CHUNK_BYTES:
        sizes.append(size)
        size //= 2
    return sizes


def token_budgets(plan: Plan) -> list[Any]:
    """Tokens of so many of the longest sequences, from a whole optimiser step's down to one's."""
    inputs = plan.inputs
    return [rows * inputs.longest_sequence for rows in range(inputs.step_rows, 0, -1)]


def generation_batches(plan: Plan) -> list[Any]:
    """From all sequences of a rollout at a time down to one."""
    return list(range(plan.inputs.rollout_rows, 0, -1))


# Key -> its values from the fastest to the one that takes least memory.
CANDIDATES: dict[str, Callable[[Plan], list[Any]]] = {
    "activation_offloading": offload_modes,
    "chunk_bytes": chunk_sizes,
    "ppo_max_token_len_per_gpu": token_budgets,
    "log_prob_max_token_len_per_gpu": token_budgets,
    "generation_batch": generation_batches,
}
