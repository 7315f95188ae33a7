"""From a plan: the smallest changes that make a run fit, and what `auto` settings stand for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from fastppo.memory import Plan
from fastppo.moments import MIB

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
    rows, steps = plan.recipe.per_device_train_batch_size, plan.recipe.gradient_accumulation_steps
    if rows % 2:
        return {}
    return {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": 2 * steps}


def halved(key: str, least: int) -> Callable[[Plan], Change]:
    """Half of a count, down to `least`."""

    def rung(plan: Plan) -> Change:
        value = getattr(plan.recipe, key)
        return {key: max(least, value // 2)} if value > least else {}

    return rung


def put(key: str, value: Any) -> Callable[[Plan], Change]:
    """A setting as it should be."""
    return lambda plan: {} if getattr(plan.recipe, key) == value else {key: value}


def quantised(bits: int) -> Callable[[Plan], Change]:
    """Fewer bits for the frozen base; what trains, or takes a merge, cannot be quantised."""

    def rung(plan: Plan) -> Change:
        recipe = plan.recipe
        now = recipe.quantization_bit or 16
        takes = recipe.finetuning_type == "lora" and not recipe.merges
        return {"quantization_bit": bits} if takes and now > bits else {}

    return rung


# From what changes nothing but speed to what changes what is learned.
LADDER: tuple[Callable[[Plan], Change], ...] = (
    halved("per_device_eval_batch_size", 1),
    smaller_batch,
    put("disable_gradient_checkpointing", False),
    put("activation_offloading", "checkpoint+offload"),
    put("bf16", True),
    halved("lora_rank", 8),
    put("critic", "shared"),
    quantised(8),
    quantised(4),
    halved("gradient_accumulation_steps", 1),
    halved("max_new_tokens", SHORTEST),
    halved("cutoff_len", SHORTEST),
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
    if "lora_rank" in together and plan.recipe.reward_source.startswith("assumed"):
        together["reward_rank"] = together["lora_rank"]
    return plan.again(**together)


@dataclass(frozen=True)
class AutoSettings:
    """What `auto` means on a device of a given size.

    Attributes:
        activation_offloading: the fastest of none, checkpoint, checkpoint+offload that fits.
        chunk_bytes: the largest budget of logits that fits, at most the operators' own default.
        micro_batch_tokens: padded tokens in a micro-batch, a whole number of longest sequences.
        generation_rows: sequences sampled at a time.
    """

    activation_offloading: str
    chunk_bytes: int
    micro_batch_tokens: int
    generation_rows: int


def auto_settings(plan: Plan, gpu_bytes: int) -> AutoSettings:
    """The fastest settings whose plan fits; the leanest where none does.

    Settled in the order that costs most time when it is wrong: sampling in few batches, no
    recomputation, large chunks, then as many sequences in a micro-batch as there is room for.
    """
    recipe = plan.recipe
    rollout = recipe.rollout_rows
    lean = plan.again(
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=max(2, rollout),  # so that gradients wait for the next
        ppo_buffer_size=1,
        generation_rows=1,
        chunk_bytes=16 * MIB,
    )
    mode = "checkpoint+offload"
    for faster in ("none", "checkpoint"):
        if lean.again(activation_offloading=faster).fits(gpu_bytes):
            mode = faster
            break
    lean = lean.again(activation_offloading=mode)
    chunk = recipe.resolved_chunk_bytes
    while chunk > 16 * MIB and not lean.again(chunk_bytes=chunk).fits(gpu_bytes):
        chunk //= 2
    lean = lean.again(chunk_bytes=chunk)
    rows = largest(lambda n: lean.again(per_device_train_batch_size=n).fits(gpu_bytes), rollout)
    generation = largest(lambda n: lean.again(generation_rows=n).fits(gpu_bytes), rollout)
    return AutoSettings(mode, chunk, rows * recipe.sequence, generation)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest count up to `most` that fits, by halving; at least 1."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
