"""Scores by a Python function, called as TRL calls its reward functions."""

from __future__ import annotations

import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastppo.config.rewards import check_function_name
from fastppo.errors import UserError
from fastppo.types import Prompt, Rollout

Function = Callable[..., Sequence[float | None]]
LARGEST = torch.finfo(torch.float32).max
GIVEN = ("prompts", "completions", "completion_ids")


def load_function(name: str, key: str) -> Function:
    """The function behind `module:name`; `key` is the setting that named it, for the error."""
    try:
        check_function_name(name, key)
    except ValueError as error:
        raise UserError(str(error)) from None
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{key}: cannot import '{module_name}' ({error}); it must be importable from here"
        ) from None
    except (Exception, SystemExit) as error:  # whatever runs when a module is imported
        raise UserError(f"{key}: importing '{module_name}' {failure(error)}; mend it") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{key}: '{module_name}' has no function '{attribute}'; check its name")
    if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
        raise UserError(f"{key}: '{name}' is an async function; give a plain one")
    return function


def failure(error: Exception) -> str:
    """What was raised, and at which line: all of a traceback that fits in one line."""
    *_, frame = traceback.extract_tb(error.__traceback__)
    place = f"{frame.filename.rsplit('/', 1)[-1]} line {frame.lineno}"
    return f"raised {type(error).__name__}: {str(error)[:200]} ({place})"


def parameters_of(function: Function) -> Mapping[str, inspect.Parameter]:
    """What a function takes; nothing where it does not say (some builtins)."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def check_arguments(function: Function, key: str, given: set[str]) -> None:
    """Refuse a function that needs an argument which nothing here gives."""
    for name, parameter in parameters_of(function).items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UserError(f"{key}: its argument '{name}' cannot be given by name; drop the '/'")
        if parameter.default is parameter.empty and name not in given:
            raise UserError(
                f"{key}: takes '{name}', which is none of {', '.join(sorted(given))}; rename it, "
                "give it a default, or take **kwargs"
            )


def call_scores(
    function: Function,
    key: str,
    prompts: list[str],
    completions: list[str],
    columns: Mapping[str, list[Any]] | None = None,
    completion_ids: list[list[int]] | None = None,
) -> list[float | None]:
    """Scores of `completions`, checked: a finite number each, or None where it does not apply.

    TRL's convention: everything goes by keyword, `prompts`, `completions` and `completion_ids` and
    the record's columns under their names. A function gets what it takes; `**kwargs` takes all.
    """
    given: dict[str, Any] = {**(columns or {}), "prompts": prompts, "completions": completions}
    if completion_ids is not None:
        given["completion_ids"] = completion_ids
    check_arguments(function, key, set(given))
    parameters = parameters_of(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    taken = {name: value for name, value in given.items() if takes_all or name in parameters}
    try:
        answer = function(**taken)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's own code: whatever it raises, in one line
        raise UserError(f"{key}: {failure(error)}; mend the function") from None
    return check_scores(answer, key, completions)


def check_scores(answer: Any, key: str, completions: list[str]) -> list[float | None]:
    """A finite number or None for each completion."""
    if inspect.isawaitable(answer):
        getattr(answer, "close", lambda: None)()
        raise UserError(f"{key}: gave an awaitable; give a plain function, not an async one")
    try:
        scores = [None if score is None else float(score) for score in answer]
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"{key}: gave {str(answer)[:80]!r}; it must give a list with a number or None for each "
            "completion"
        ) from None
    if len(scores) != len(completions):
        raise UserError(
            f"{key}: gave {len(scores)} scores for {len(completions)} completions; one for each is "
            "needed"
        )
    for completion, score in zip(completions, scores, strict=True):
        if score is not None and not abs(score) <= LARGEST:  # NaN is not
            raise UserError(
                f"{key}: gave {score} for the completion {completion[:80]!r}; give a finite number"
            )
    return scores


def columns_of(prompts: list[Prompt]) -> dict[str, list[Any]]:
    """The records' columns by name; None where a record lacks one."""
    names = {name for prompt in prompts for name in prompt.columns}
    return {
        name: [prompt.columns.get(name) for prompt in prompts]
        for name in sorted(names)
        if name not in GIVEN
    }


class FunctionReward:
    """Scores (B,) by a Python function; NaN where it gave None: not applicable."""

    def __init__(self, name: str, prompts: list[Prompt] | None = None) -> None:
        self.key = f"reward_model: {name}"
        self.function = load_function(name, "reward_model")
        if prompts is not None:
            check_arguments(self.function, self.key, {*GIVEN, *columns_of(prompts)})

    def __call__(self, rollout: Rollout) -> Tensor:
        rows = rollout.input_ids_BT.tolist()
        ids = [
            row[prompt:length]
            for row, prompt, length in zip(
                rows, rollout.prompt_lengths, rollout.lengths, strict=True
            )
        ]
        prompts = [prompt.text for prompt in rollout.prompts]
        scores = call_scores(
            self.function, self.key, prompts, rollout.texts, columns_of(rollout.prompts), ids
        )
        values = [math.nan if score is None else score for score in scores]
        return torch.tensor(values, device=rollout.input_ids_BT.device)
