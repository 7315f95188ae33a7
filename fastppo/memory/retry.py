"""Out of memory: a phase is repeated once with half of its budget; a second failure ends the run.

accelerate's find_executable_batch_size halves the batch and restarts the whole function; here one
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
# Messages of out-of-memory errors that are not torch.OutOfMemoryError: on a CPU, CUDA's, cuBLAS's.
WORDS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class OutOfMemory(TrainingStopped):
    """A phase ran out of memory again with half of its budget. Exit code 1."""


def out_of_memory(error: BaseException) -> bool:
    """Whether the error is a failed allocation, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def may_be_retried(error: Exception) -> bool:
    """Whether the error is a failed allocation that has not been retried by an inner `retry`."""
    return out_of_memory(error) and not isinstance(error, OutOfMemory)


def retry(
    phase: Phase,
    budgets: Budgets,
    *,
    used: Callable[[], int],
    clean: Callable[[], None] = lambda: None,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: if the function runs out of memory, call it once more with half of the budget.

    The second call starts from the same state: the generators of Python, NumPy and PyTorch are
    restored, and `clean` removes what the first call has left. `budgets` stay halved in later
    steps. The function must not do what may not happen twice, such as asking a reward.

    Args:
        phase: rollout, score or update.
        budgets: the run's, halved in place; the function must read its budget from them, or from
            the `Budget` object in them, at each call.
        used: returns the largest number that the phase processed at a time (of sequences in
            rollout, else of tokens in a micro-batch); half of it becomes the new budget.
        clean: releases gradients and other state that the failed call has left.

    Raises:
        OutOfMemory: the second call ran out of memory too, or nothing can be halved.
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
            # Outside the `except` block: the traceback keeps all tensors of the failed call alive.
            clean()
            if not budgets.retries:
                raise OutOfMemory(
                    f"out of memory in {phase}, which no process can try again while others wait "
                    "for it (fsdp)"
                )
            set_random_state(random)
            release_memory()
            change = budgets.halve(phase, used())
            if change is None:
                raise OutOfMemory(
                    f"out of memory in {phase}, which takes on one sequence at a time"
                )
            note(
                f"out of memory in {phase}: tries once more, and goes on, with {change}",
                every_process=True,
            )
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if not may_be_retried(error):
                    raise
            clean()
            release_memory()
            raise OutOfMemory(f"out of memory in {phase}, also with {change}")

        return run

    return decorate


def release_memory() -> None:
    """Collect garbage, and free the operators' buffers and the allocator's cached blocks."""
    gc.collect()
    workspace.release()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
