"""Out of memory: a phase is repeated once with half of its budget; a second failure ends the run.

accelerate's find_executable_batch_size halves the batch of a whole run and starts it anew; here one
phase of a step is repeated in smaller parts, with the same result.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from fastppo.errors import TrainingStopped, note
from fastppo.memory.budgets import Budgets, Phase
from fastppo.ops import workspace
from fastppo.seeds import random_state, set_random_state

P = ParamSpec("P")
T = TypeVar("T")
# Messages of other errors than torch.OutOfMemoryError: PyTorch's on a CPU, CUDA's, cuBLAS's.
WORDS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class OutOfMemory(TrainingStopped):
    """A phase ran out of memory with half of its budget too. Exit code 1."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def may_be_retried(error: Exception) -> bool:
    """Whether an allocation failed that no retry inside has given up on."""
    return out_of_memory(error) and not isinstance(error, OutOfMemory)


def retry(
    phase: Phase,
    budgets: Budgets,
    *,
    used: Callable[[], int],
    clean: Callable[[], None] = lambda: None,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: a function that runs out of memory is called once more with half of the budget.

    The second call starts where the first one did: the generators of Python, NumPy and PyTorch are
    restored, and `clean` removes what the first call left behind. `budgets` stay halved for the
    steps that follow. What must not happen twice (asking a reward) does not belong into the
    function.

    Args:
        phase: rollout, score or update.
        budgets: the run's, halved in place; the function must read its own budget from them, or
            from the `Budget` object in them, at each call.
        used: returns the most that the phase ran at a time (sequences in rollout, else tokens of
            a micro-batch): that is what has to be halved where the budget is larger.
        clean: releases gradients and other state that the failed call left.

    Raises:
        OutOfMemory: the second call ran out of memory too, or there is nothing to halve.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            random = random_state()
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if not may_be_retried(error):
                    raise
            # Out here: the traceback would hold every tensor of the call that failed.
            clean()
            set_random_state(random)
            give_back()
            change = budgets.halve(phase, used())
            if change is None:
                raise OutOfMemory(
                    f"out of memory in {phase}, which takes on one sequence at a time"
                )
            note(f"out of memory in {phase}: tries once more, and goes on, with {change}")
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if not may_be_retried(error):
                    raise
            clean()
            give_back()
            raise OutOfMemory(f"out of memory in {phase}, also with {change}")

        return run

    return decorate


def give_back() -> None:
    """Collect garbage; release the operators' buffers and the allocator's cached blocks."""
    gc.collect()
    workspace.release()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
