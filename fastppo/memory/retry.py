"""Out of memory: half of a phase's budget, once more from a clean state; then one line, the end.

accelerate's find_executable_batch_size halves the batch of a whole run and starts it anew; here a
phase of a step is repeated in smaller parts, with the same result.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from fastppo.errors import TrainingStopped, note
from fastppo.memory.budgets import Budgets, Phase
from fastppo.ops import workspace
from fastppo.seeds import random_state, set_random_state

T = TypeVar("T")
# What allocators say beside torch.OutOfMemoryError: PyTorch's own on a CPU, CUDA's, cuBLAS's.
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


def retried(
    phase: Phase,
    budgets: Budgets,
    run: Callable[[], T],
    *,
    used: Callable[[], int],
    clean: Callable[[], None] = lambda: None,
) -> T:
    """`run()`; where it runs out of memory, once more with half of what the phase takes on.

    The second try starts where the first one did: the generators of Python, NumPy and PyTorch are
    put back, and `clean` drops what the first one left. `budgets` stay halved for the steps that
    follow. What must not happen twice (asking a reward) does not belong into `run`.

    Args:
        phase: rollout, score or update.
        budgets: the run's; `run` reads them anew each time.
        used: gives what the phase took on at most (sequences in rollout, else tokens of a
            micro-batch), which is what has to be halved where the budget is larger.

    Raises:
        OutOfMemory: the second try ran out of memory too, or there is nothing to halve.
    """
    random = random_state()
    try:
        return run()
    except Exception as error:
        if isinstance(error, OutOfMemory) or not out_of_memory(error):
            raise
    # Out here: the traceback would hold every tensor of the pass that failed.
    clean()
    set_random_state(random)
    give_back()
    change = budgets.halve(phase, used())
    if change is None:
        raise OutOfMemory(f"out of memory in {phase}, which takes on one sequence at a time")
    note(f"out of memory in {phase}: tries once more, and goes on, with {change}")
    try:
        return run()
    except Exception as error:
        if isinstance(error, OutOfMemory) or not out_of_memory(error):
            raise
    clean()
    give_back()
    raise OutOfMemory(f"out of memory in {phase}, also with {change}")


def give_back() -> None:
    """Let go of what nobody refers to, of the operators' buffers and of the device's blocks."""
    gc.collect()
    workspace.release()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
