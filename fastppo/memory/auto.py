"""Before anything is loaded: the memory plan of the run, and what its `auto` settings come to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch

from fastppo.errors import TrainingStopped, UserError
from fastppo.memory.advice import advise, choose_auto
from fastppo.memory.command import plan_of, spell
from fastppo.memory.inputs import AUTO_KEYS
from fastppo.memory.retry import OutOfMemory, out_of_memory
from fastppo.memory.units import GIB

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.memory.budgets import Budgets
    from fastppo.memory.plan import Plan

CONTEXT = GIB // 2  # of a GPU, taken already, and part of the plan's reserve
KEPT_FREE = GIB  # of a host's memory, for all else that runs there


def room_of(device: torch.device) -> int:
    """Bytes that a run may take on `device`, what it has taken already included."""
    if device.type == "cpu":
        process = psutil.Process().memory_info().rss
        return int(psutil.virtual_memory().available) + process - KEPT_FREE
    free, total = torch.cuda.mem_get_info(device)
    return min(total, free + torch.cuda.memory_reserved(device) + CONTEXT)


def resolve_auto(config: Config, device: torch.device) -> tuple[Config, Plan | None, list[str]]:
    """The configuration without `auto`, its plan, and what to say of both.

    A model whose shape is not known has no plan: that is a note, and an error only where the plan
    is asked to decide.

    Raises:
        UserError: `auto` for a run that cannot be planned.
    """
    try:
        plan, _ = plan_of(config, "gpu" if device.type == "cuda" else "cpu")
    except UserError as error:
        if autos(config):
            raise
        return config, None, [f"no memory plan: {error}"]
    notes = []
    if plan.inputs.auto:
        chosen = choose_auto(plan, room_of(device))
        plan = plan.with_changes(**chosen)
        config = config.model_copy(update=chosen)
        notes.append(f"auto, by the memory plan: {spell(chosen)}")
    return config, plan, notes


def autos(config: Config) -> list[str]:
    """Keys that leave a decision to the plan."""
    return [key for key in AUTO_KEYS if getattr(config, key, None) == "auto"]


@contextmanager
def advice_on_failure(
    plan: Plan | None, config: Config, budgets: Budgets, device: torch.device
) -> Iterator[None]:
    """Inside, running out of memory for good is one line, with the smallest changes that help.

    Raises:
        TrainingStopped: what ran out, and what to change.
    """
    try:
        yield
        return
    except Exception as error:
        if not (isinstance(error, OutOfMemory) or out_of_memory(error)):
            raise
        what = str(error) if isinstance(error, OutOfMemory) else "out of memory"
    # Out here: the traceback holds what was allocated.
    cure = smallest_changes(plan, config, budgets, room_of(device))
    raise TrainingStopped(f"{what}; {cure}") from None


def smallest_changes(plan: Plan | None, config: Config, budgets: Budgets, room: int) -> str:
    """What to change in a run that did not fit, in words.

    Where the plan says that it fits, what takes a tenth off its peak: the plan is wrong by less.
    """
    if plan is None:
        return "lower per_device_train_batch_size, lora_rank or max_new_tokens"
    if config.stage == "ppo":
        plan = plan.with_changes(**budgets.decisions())
    target = min(room, int(0.9 * plan.peak.total))
    steps = advise(plan, target, type(config).model_fields).steps
    if not steps:
        return "no setting makes it smaller; use a smaller model"
    return "the smallest changes that help: " + ", then ".join(spell(s.change) for s in steps)
