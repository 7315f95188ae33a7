"""Which evaluation of a run is the best, and whether to stop for want of a better one.

Both follow from the evaluations so far alone, which every checkpoint holds: a resumed run decides
as the uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastppo.config.best import best_metric

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.ppo.state import State

Evaluations = Sequence[dict[str, Any]]


def compared(evaluations: Evaluations, config: Config) -> list[dict[str, Any]]:
    """The evaluations of trained policies that have the metric, by step."""
    name = best_metric(config)
    found = [each for each in evaluations if each["step"] > 0 and each.get(name) is not None]
    return sorted(found, key=lambda each: each["step"])


def ranked(evaluations: Evaluations, config: Config) -> list[dict[str, Any]]:
    """The same, the best first; of two with the same value the earlier one."""
    sign = 1.0 if config.greater_is_better is False else -1.0
    name = best_metric(config)
    return sorted(compared(evaluations, config), key=lambda each: sign * each[name])


def best(evaluations: Evaluations, config: Config) -> dict[str, Any] | None:
    """The best evaluation; None if there is none yet."""
    return next(iter(ranked(evaluations, config)), None)


def is_new_best(state: State) -> bool:
    """Whether `load_best_model_at_end` wants a checkpoint of the present step."""
    if not state.config.load_best_model_at_end:
        return False
    found = best(state.evaluations, state.config)
    return found is not None and found["step"] == state.step and state.saved_step != state.step


def stops_early(state: State) -> bool:
    """Whether `early_stopping_steps` evaluations in a row were no better than the best."""
    patience, config = state.config.early_stopping_steps, state.config
    found = compared(state.evaluations, config)
    if not patience or not found:
        return False
    return len(found) - 1 - found.index(ranked(found, config)[0]) >= patience


def trainer_state(evaluations: Evaluations, config: Config, output_dir: str) -> dict[str, Any]:
    """What transformers' TrainerState says about the best evaluation; empty if nobody asked."""
    if not (config.load_best_model_at_end or config.early_stopping_steps):
        return {}
    found = best(evaluations, config)
    if found is None:
        return {}
    folder = f"{output_dir}/checkpoint-{found['step']}"
    return {
        "best_metric": found[best_metric(config)],
        "best_global_step": found["step"],
        "best_model_checkpoint": folder if config.load_best_model_at_end else None,
    }
