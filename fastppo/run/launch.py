"""Which device a run takes, and what the variables of a launcher mean to it.

No torch at import.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from fastppo.errors import UserError

if TYPE_CHECKING:
    import torch

    from fastppo.config import Config

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


class Launched(NamedTuple):
    """One of the processes that torchrun started, on this machine and on others."""

    rank: int
    size: int
    local_rank: int  # among those of this machine


# What torchrun tells each process; accelerate launch tells the same.
TOLD_BY_TORCHRUN: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched() -> Launched | None:
    """Which process of torchrun's this is; None for a process alone."""
    said = {name: os.environ.get(name, "") for name in TOLD_BY_TORCHRUN}
    rank, size, local_rank = (said[name] for name in TOLD_BY_TORCHRUN[:3])
    if not all(said.values()) or not all(x.isdecimal() for x in (rank, size, local_rank)):
        return None
    return Launched(int(rank), int(size), int(local_rank)) if int(size) > 1 else None


def check_launcher(config: Config) -> int:
    """The number of processes of this run, which torchrun has started.

    Raises:
        UserError: another launcher started several, or there is not a prompt (in stage rm a pair)
            a step for each of them.
    """
    found, named = launched(), processes()
    if found is None and not named:
        return 1
    from fastppo.config.parallel import check_processes  # --help builds no configuration

    if found is None:
        name, count = next(iter(named.items()))
        raise UserError(
            f"{name}: is {count}, so a launcher started {count} processes, which do not know how "
            f"to meet: torchrun's variables ({', '.join(TOLD_BY_TORCHRUN)}) are not all set; start "
            f"them by torchrun (docs/scaling.md), or unset {' '.join(named)}"
        )
    check_processes(config, found.size, "WORLD_SIZE")
    return found.size


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
def hide_launcher_variables() -> Iterator[None]:
    """Inside the block (or the decorated function) no launcher's environment variables are set.

    transformers' Trainer would join a process group of one, and take accelerate's own settings.
    """
    hidden = {x: os.environ.pop(x) for x in list(os.environ) if x.startswith(READ_BY_ACCELERATE)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def choose_device(config: Config) -> torch.device:
    """The GPU if there is one, unless `use_cpu`; sets the process's float32 precision by `tf32`."""
    import torch

    if config.tf32 is not None:
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    if not torch.cuda.is_available() or config.use_cpu:
        return torch.device("cpu")
    found = launched()
    return torch.device("cuda") if found is None else torch.device("cuda", found.local_rank)


def note_on_device(
    config: Config, device: torch.device, driver: Path = Path("/proc/driver/nvidia/version")
) -> str | None:
    """A line where a run leaves GPUs unused; else None.

    That is one on the CPU beside an NVIDIA GPU that torch does not see, or one process beside
    several GPUs.

    Args:
        config: the run's; `use_cpu` asks for the CPU, and nothing is said.
        device: where the run computes.
        driver: what Linux has where NVIDIA's driver is loaded.
    """
    import torch

    if device.type == "cuda" and launched() is None and (count := torch.cuda.device_count()) > 1:
        return (
            f"this run is one process on one of {count} visible GPUs; torchrun --nproc-per-node "
            f"{count} -m fastppo CONFIG runs it on all of them (docs/scaling.md)"
        )
    if device.type != "cpu" or config.use_cpu or not driver.exists():
        return None
    why = "look at nvidia-smi, at CUDA_VISIBLE_DEVICES, and whether the driver is old for torch"
    if torch.version.cuda is None:
        why = "it is a build without CUDA: install one with it (pytorch.org)"
    return (
        "this run is on the CPU, though NVIDIA's driver is loaded: torch "
        f"{torch.__version__} sees no GPU; {why}. use_cpu: true says that the CPU is meant"
    )
