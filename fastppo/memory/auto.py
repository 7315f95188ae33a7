"""How a run uses its memory plan: `auto` keys before loading, advice if memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch

from fastppo.errors import TrainingStopped, UserError
from fastppo.memory.advice import advise, choose_auto, choose_offloading, format_settings
from fastppo.memory.inputs import AUTO_KEYS
from fastppo.memory.plan import plan_config
from fastppo.memory.retry import OutOfMemory, out_of_memory
from fastppo.memory.units import CONTEXT, GIB
from fastppo.ops.backend import choose

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.memory.budgets import Budgets
    from fastppo.memory.plan import Plan
    from fastppo.run.world import World

HOST_RESERVE = GIB  # host memory for all other processes


def available_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that a run may take on `device`, including what it has taken already.

    On a CPU it is a process's part, if all `processes` are on this host.
    """
    if device.type == "cpu":
        process = int(psutil.Process().memory_info().rss)
        free = int(psutil.virtual_memory().available) - HOST_RESERVE
        return free // processes + process
    free, total = torch.cuda.mem_get_info(device)
    return int(min(total, free + torch.cuda.memory_reserved(device) + CONTEXT))


def resolve_auto(
    config: Config, device: torch.device, world: World, **lengths: int
) -> tuple[Config, Plan | None, list[str]]:
    """Replace each `auto` by a value, and decide whether activations are kept if no key says it.

    Returns the configuration, the plan of one of the run's processes, and notes to print. If the
    model's shape is unknown, there is no plan, and a note says so. All processes get the same
    values: those for which each of them has memory. An `auto` key counts on the longest sequences
    that the configuration allows; activations are kept by the longest that the data have, `lengths`
    by the keys that limit them.

    Raises:
        UserError: a key is `auto`, but the run cannot be planned.
    """
    try:
        on_gpu = device.type == "cuda"
        card = torch.cuda.mem_get_info(device)[1] if on_gpu else None
        plan, _ = plan_config(config, "gpu" if on_gpu else "cpu", world.size, card)
    except UserError as error:
        if auto := auto_keys(config):
            raise UserError(
                f"{error}; or give {', '.join(auto)} a value in place of auto"
            ) from None
        return config, None, [f"no memory plan: {error}"]
    if not on_gpu and choose("linear", None, torch.empty(0)) != "native":
        plan = plan.with_changes(compiled_ops=False)
    if not (plan.inputs.auto or plan.inputs.decides_offloading):
        return config, plan, []
    available = min(world.gather(available_memory(device, world.size)))
    notes = []
    if chosen := choose_auto(plan, available):
        notes.append(f"auto, by the memory plan: {format_settings(chosen)}")
    decided = plan.with_changes(**chosen)
    chosen |= choose_offloading(decided.for_lengths(**lengths), available)
    return config.model_copy(update=chosen), plan.with_changes(**chosen), notes


def auto_keys(config: Config) -> list[str]:
    """Keys whose value the plan decides."""
    return [key for key in AUTO_KEYS if getattr(config, key, None) == "auto"]


@contextmanager
def advice_on_failure(
    plan: Plan | None, config: Config, budgets: Budgets, device: torch.device
) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into one line with the smallest changes to make.

    Args:
        plan: the run's; None if its model's shape is unknown.
        budgets: the run's, which may have been halved.

    Raises:
        TrainingStopped: says which memory ran out, and what to change.
    """
    try:
        yield
        return
    except Exception as error:
        if not (isinstance(error, OutOfMemory) or out_of_memory(error)):
            raise
        what = str(error) if isinstance(error, OutOfMemory) else "out of memory"
    # Outside the `except` block: the traceback keeps the allocated tensors alive.
    cure = suggest_changes(plan, config, budgets, available_memory(device))
    raise TrainingStopped(f"{what}; {cure}") from None


def suggest_changes(
    plan: Plan | None, config: Config, budgets: Budgets, available_bytes: int
) -> str:
    """A sentence on which settings to change in a run that ran out of memory.

    If the plan predicts that the run fits, the advised changes lower its peak by a tenth, because
    the plan's error is smaller than that.
    """
    if plan is None:
        return "lower per_device_train_batch_size, lora_rank or max_new_tokens"
    if config.stage == "ppo":
        plan = plan.with_changes(**budgets.decisions())
    target = min(available_bytes, int(0.9 * plan.peak.total))
    steps = advise(plan, target, type(config).model_fields).steps
    if not steps:
        return "no setting makes it smaller; use a smaller model"
    return "the smallest changes that help: " + ", then ".join(
        format_settings(step.settings) for step in steps
    )
