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
    """Import the function `name`, written `module:function`; `key` is the setting that names it."""
    try:
        check_function_name(name, key)
    except ValueError as error:
        raise UserError(str(error)) from None
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        top = module_name.partition(".")[0]
        cure = "mend that import"
        if isinstance(error, ModuleNotFoundError) and error.name in (top, module_name):
            cure = f"put {top}.py into the folder in which the command runs, or install it"
        raise UserError(f"{key}: cannot import '{module_name}' ({error}); {cure}") from None
    except (Exception, SystemExit) as error:  # importing a module can raise anything
        raise UserError(
            f"{key}: importing '{module_name}' {describe_exception(error)}; mend it"
        ) from None
    function: Function | None = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{key}: '{module_name}' has no function '{attribute}'; check its name")
    if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
        raise UserError(f"{key}: '{name}' is an async function; give a plain one")
    return function


def describe_exception(error: BaseException) -> str:
    """One line on an exception: type, message, and file and line of the last frame."""
    *_, frame = traceback.extract_tb(error.__traceback__)
    where = f"{frame.filename.rsplit('/', 1)[-1]} line {frame.lineno}"
    return f"raised {type(error).__name__}: {str(error)[:200]} ({where})"


def parameters_of(function: Function) -> Mapping[str, inspect.Parameter]:
    """The function's parameters by name; empty if it has no signature, like some builtins."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def check_arguments(function: Function, key: str, given: set[str]) -> None:
    """Raise UserError if the function requires a parameter whose name is not in `given`."""
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
    """Call a reward function as TRL does; returns a finite number or None for each completion.

    All arguments are passed by keyword: `prompts`, `completions`, `completion_ids`, and the
    records' columns by their names. A function gets the arguments that it has parameters for, or
    all of them if it has `**kwargs`. A score of None means that the reward does not apply.
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
    except (Exception, SystemExit) as error:  # a user's function can raise anything
        raise UserError(f"{key}: {describe_exception(error)}; mend the function") from None
    return check_scores(answer, key, completions)


def check_scores(answer: Any, key: str, completions: list[str]) -> list[float | None]:
    """Check a function's result; returns a finite number or None for each completion."""
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
        if score is not None and not abs(score) <= LARGEST:  # also refuses NaN
            raise UserError(
                f"{key}: gave {score} for the completion {completion[:80]!r}; give a finite number"
            )
    return scores


def columns_of(prompts: list[Prompt]) -> dict[str, list[Any]]:
    """The records' columns by name, with a value for each prompt (None if its record has none)."""
    names = {name for prompt in prompts for name in prompt.columns}
    return {
        name: [prompt.columns.get(name) for prompt in prompts]
        for name in sorted(names)
        if name not in GIVEN
    }


class FunctionReward:
    """Scores a rollout with a Python function; returns (B,) float32, with NaN for None.

    The function is `function`, or imported by its `name`.

    If `prompts` are given, the function's parameters are checked against their columns at once.
    """

    def __init__(
        self, name: str, prompts: list[Prompt] | None = None, function: Function | None = None
    ) -> None:
        self.key = f"reward_model: {name}"
        self.function = function or load_function(name, "reward_model")
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
