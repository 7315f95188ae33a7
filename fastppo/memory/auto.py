"""A run and its memory plan: `auto` keys are resolved before loading, advice follows a failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch

from fastppo.errors import TrainingStopped, UserError
from fastppo.memory.advice import advise, choose_auto, format_settings
from fastppo.memory.inputs import AUTO_KEYS
from fastppo.memory.plan import plan_config
from fastppo.memory.retry import OutOfMemory, out_of_memory
from fastppo.memory.units import GIB

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.memory.budgets import Budgets
    from fastppo.memory.plan import Plan

CONTEXT = GIB // 2  # of a GPU, taken already, and part of the plan's reserve
HOST_RESERVE = GIB  # of a host's memory, for all else that runs there


def available_memory(device: torch.device) -> int:
    """Bytes that a run may take on `device`, what it has taken already included."""
    if device.type == "cpu":
        process = int(psutil.Process().memory_info().rss)
        return int(psutil.virtual_memory().available) + process - HOST_RESERVE
    free, total = torch.cuda.mem_get_info(device)
    return int(min(total, free + torch.cuda.memory_reserved(device) + CONTEXT))


def resolve_auto(config: Config, device: torch.device) -> tuple[Config, Plan | None, list[str]]:
    """The configuration with a value in place of each `auto`, its plan, and notes to print.

    A model whose shape is not known has no plan: that is a note, and an error only where a key is
    `auto`.

    Raises:
        UserError: `auto` for a run that cannot be planned.
    """
    try:
        plan, _ = plan_config(config, "gpu" if device.type == "cuda" else "cpu")
    except UserError as error:
        if auto := auto_keys(config):
            raise UserError(
                f"{error}; or give {', '.join(auto)} a value in place of auto"
            ) from None
        return config, None, [f"no memory plan: {error}"]
    notes = []
    if plan.inputs.auto:
        chosen = choose_auto(plan, available_memory(device))
        plan = plan.with_changes(**chosen)
        config = config.model_copy(update=chosen)
        notes.append(f"auto, by the memory plan: {format_settings(chosen)}")
    return config, plan, notes


def auto_keys(config: Config) -> list[str]:
    """Keys whose value is left to the plan."""
    return [key for key in AUTO_KEYS if getattr(config, key, None) == "auto"]


@contextmanager
def advice_on_failure(
    plan: Plan | None, config: Config, budgets: Budgets, device: torch.device
) -> Iterator[None]:
    """Turns an out-of-memory error inside into one line with the smallest changes that help.

    Args:
        plan: of the run; None where its model's shape is not known.
        budgets: as they are when memory runs out, after halving.

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
    cure = suggest_changes(plan, config, budgets, available_memory(device))
    raise TrainingStopped(f"{what}; {cure}") from None


def suggest_changes(
    plan: Plan | None, config: Config, budgets: Budgets, available_bytes: int
) -> str:
    """The settings to change in a run that did not fit, in words.

    If the plan predicts that it fits, those that take a tenth off its peak: the plan is wrong by
    less.
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
