"""One process, one device: what a launcher's environment means to a run. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from fastppo.errors import UserError

# How many processes the launcher started for this command. Not SLURM_NTASKS: a batch script has it
# too, where it is what `srun` would start, and the script's own commands run once.
SIZES: Final = (
    "WORLD_SIZE",  # torchrun, accelerate launch, deepspeed
    "OMPI_COMM_WORLD_SIZE",  # Open MPI
    "PMI_SIZE",  # MPICH, Intel MPI, srun --mpi=pmi2
    "MV2_COMM_WORLD_SIZE",  # MVAPICH2
    "HOROVOD_SIZE",
    "SLURM_STEP_NUM_TASKS",  # srun
)
# What accelerate reads when transformers' Trainer is made: a process group to join, other devices,
# another precision.
READ_BY_ACCELERATE: Final = (*SIZES, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_")


def processes() -> dict[str, int]:
    """The variables that say that this process is one of several, and of how many."""
    said = {name: os.environ.get(name, "") for name in SIZES}
    return {name: int(x) for name, x in said.items() if x.isdecimal() and int(x) > 1}


def check_one_process(command: str, key: str) -> None:
    """Refuse to be one of several processes, which would all write the folder in `key`.

    Raises:
        UserError: the variables that say so, and how to start `command`.
    """
    found = processes()
    if not found:
        return
    name, count = next(iter(found.items()))
    raise UserError(
        f"{name}: is {count}, so a launcher (torchrun, accelerate launch, mpirun, srun) started "
        f"{count} processes, which would all write {key}; {command} is one process on one device: "
        f"start it by itself, or unset {' '.join(found)}"
    )


@contextmanager
def alone() -> Iterator[None]:
    """Inside, no launcher's variables are there: a process that it started alone is like any other.

    transformers' Trainer would join a process group of one, and take accelerate's own settings.
    """
    hidden = {x: os.environ.pop(x) for x in list(os.environ) if x.startswith(READ_BY_ACCELERATE)}
    try:
        yield
    finally:
        os.environ.update(hidden)
