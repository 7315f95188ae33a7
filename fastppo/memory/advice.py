"""From a plan: the smallest changes that make a run fit, and what `auto` settings stand for."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastppo.memory.inputs import AUTO_KEYS
from fastppo.memory.plan import Plan
from fastppo.memory.units import MIB

LEAST_CHUNK = 16 * MIB
SHORTEST = 256  # lengths are not cut below this: it would be another task
Change = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """Keys to change together, and the peak once they and all before them are changed."""

    change: Change
    peak: int


@dataclass(frozen=True)
class Advice:
    """Changes in the order to try them; `fits` says whether they are enough."""

    steps: tuple[Step, ...]
    fits: bool

    @property
    def change(self) -> Change:
        """All of them together."""
        return {key: value for step in self.steps for key, value in step.change.items()}


def smaller_batch(plan: Plan) -> Change:
    """Half the micro-batch, and twice as many of them: the same optimiser step."""
    if plan.inputs.ppo_max_token_len_per_gpu is not None:
        rows, length = plan.inputs.update_batch
        return {"ppo_max_token_len_per_gpu": rows // 2 * length} if rows > 1 else {}
    rows, steps = plan.inputs.per_device_train_batch_size, plan.inputs.gradient_accumulation_steps
    if rows % 2:
        return {}
    return {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": 2 * steps}


def smaller_scoring(plan: Plan) -> Change:
    """Half as many sequences in a scoring pass."""
    rows, length = plan.inputs.score_batch
    return {"log_prob_max_token_len_per_gpu": rows // 2 * length} if rows > 1 else {}


def fewer_at_once(plan: Plan) -> Change:
    """Half as many sequences sampled at a time."""
    rows = plan.inputs.rollout_rows
    return {"generation_batch": rows // 2} if rows > 1 else {}


def halved(key: str, least: int) -> Callable[[Plan], Change]:
    """Half of a count, down to `least`."""

    def rung(plan: Plan) -> Change:
        value = getattr(plan.inputs, key)
        return {key: max(least, value // 2)} if value > least else {}

    return rung


def shorter(key: str) -> Callable[[Plan], Change]:
    """Half of a length, down to SHORTEST; budgets that are in tokens shrink with the sequence."""

    def rung(plan: Plan) -> Change:
        inputs = plan.inputs
        value = getattr(inputs, key)
        if value <= SHORTEST:
            return {}
        change: Change = {key: max(SHORTEST, value // 2)}
        sequence = replace(inputs, **change).sequence
        for budget in ("ppo_max_token_len_per_gpu", "log_prob_max_token_len_per_gpu"):
            tokens = getattr(inputs, budget)
            if tokens is not None:
                change[budget] = tokens * sequence // inputs.sequence
        return change

    return rung


def put(key: str, value: Any) -> Callable[[Plan], Change]:
    """A setting as it should be."""
    return lambda plan: {} if getattr(plan.inputs, key) == value else {key: value}


def quantised(bits: int) -> Callable[[Plan], Change]:
    """Fewer bits for the frozen base; what trains, or takes a merge, cannot be quantised."""

    def rung(plan: Plan) -> Change:
        inputs = plan.inputs
        now = inputs.quantization_bit or 16
        takes = inputs.finetuning_type == "lora" and not inputs.merges
        return {"quantization_bit": bits} if takes and now > bits else {}

    return rung


# From what changes nothing but speed to what changes what is learned.
LADDER: tuple[Callable[[Plan], Change], ...] = (
    halved("per_device_eval_batch_size", 1),
    smaller_scoring,
    smaller_batch,
    fewer_at_once,
    put("disable_gradient_checkpointing", False),
    put("activation_offloading", "checkpoint+offload"),
    put("bf16", True),
    halved("lora_rank", 8),
    put("critic", "shared"),
    quantised(8),
    quantised(4),
    halved("gradient_accumulation_steps", 1),
    shorter("max_new_tokens"),
    shorter("cutoff_len"),
)


def advise(plan: Plan, gpu_bytes: int, known: Collection[str]) -> Advice:
    """The smallest changes of `known` keys after which the run fits into `gpu_bytes`.

    The lowest rung that lowers the peak is taken, again and again; then those that turned out not
    to be needed are taken back, the dearest first.
    """
    changes = climb(plan, known, gpu_bytes)
    if applied(plan, changes).fits(gpu_bytes):
        for rung in sorted(changes, reverse=True):
            fewer = {other: change for other, change in changes.items() if other != rung}
            if applied(plan, fewer).fits(gpu_bytes):
                changes = fewer
    steps, so_far = [], {}
    for rung in sorted(changes):
        so_far[rung] = changes[rung]
        steps.append(Step(changes[rung], applied(plan, so_far).peak.total))
    return Advice(tuple(steps), applied(plan, changes).fits(gpu_bytes))


def climb(plan: Plan, known: Collection[str], gpu_bytes: int) -> dict[int, Change]:
    """Rung -> its change, until the run fits or no rung helps."""
    changes: dict[int, Change] = {}
    now = plan
    while not now.fits(gpu_bytes):
        for rung, step in enumerate(LADDER):
            change = step(now)
            if not change or not set(change) <= set(known):
                continue
            lower = applied(plan, {**changes, rung: change})
            if lower.peak.total <= now.peak.total - MIB:
                changes[rung], now = change, lower
                break
        else:
            break
    return changes


def applied(plan: Plan, changes: dict[int, Change]) -> Plan:
    """The plan after these changes; an assumed reward adapter follows the policy's rank."""
    together = {key: changes[rung][key] for rung in sorted(changes) for key in changes[rung]}
    if "lora_rank" in together and plan.inputs.reward_source.startswith("assumed"):
        together["reward_rank"] = together["lora_rank"]
    return plan.with_changes(**together)


def choose_auto(plan: Plan, room: int) -> Change:
    """Values for the keys that the inputs leaves to the plan: the fastest whose plan fits in `room`
    bytes, the leanest where none does.

    One after the other, in the order of AUTO_KEYS, while those still open are at their leanest.
    """
    choices = {key: CHOICES[key](plan) for key in AUTO_KEYS if key in plan.inputs.auto}
    chosen: Change = {key: values[-1] for key, values in choices.items()}
    for key, values in choices.items():
        fits = partial(fits_with, plan, room, chosen, key)
        at = bisect_left(values, True, key=fits)
        chosen[key] = values[min(at, len(values) - 1)]
    return chosen


def fits_with(plan: Plan, room: int, chosen: Change, key: str, value: Any) -> bool:
    """Whether a run fits with what was chosen and one more value."""
    return plan.with_changes(**{**chosen, key: value}).fits(room)


def modes(plan: Plan) -> list[Any]:
    """Host memory is no place to move to where the device is the host, unless it is a file.

    `offload` alone is never chosen: it moves some 30 times as much as `checkpoint+offload`.
    """
    away = plan.inputs.device == "gpu" or plan.inputs.offload_dir
    return ["none", "checkpoint", *(["checkpoint+offload"] if away else [])]


def chunks(plan: Plan) -> list[Any]:
    """The operators' own default and halves of it, down to LEAST_CHUNK."""
    size, sizes = plan.inputs.resolved_chunk_bytes, []
    while size >= LEAST_CHUNK:
        sizes.append(size)
        size //= 2
    return sizes


def whole_rows(plan: Plan) -> list[Any]:
    """Tokens of so many of the longest sequences, from a whole optimiser step's down to one's."""
    return [rows * plan.inputs.sequence for rows in range(plan.inputs.step_rows, 0, -1)]


CHOICES: dict[str, Callable[[Plan], list[Any]]] = {
    "activation_offloading": modes,
    "chunk_bytes": chunks,
    "ppo_max_token_len_per_gpu": whole_rows,
    "log_prob_max_token_len_per_gpu": whole_rows,
    "generation_batch": lambda plan: list(range(plan.inputs.rollout_rows, 0, -1)),
}
