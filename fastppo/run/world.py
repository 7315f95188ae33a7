"""The processes of a data-parallel run: which of them this is, and what passes between them.

One process is a world of size 1, in which every function returns what it was given, and
torch.distributed is not imported. Objects go through gloo, on the host; tensors through gloo on
CPUs and NCCL on GPUs. No torch at import.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from fastppo.errors import TrainingStopped, UserError, one_line
from fastppo.memory.units import REDUCED_BYTES
from fastppo.run.launch import Launched, launched

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastppo.config import Config

T = TypeVar("T")
# A launcher that stops a run signals its processes one after another: so long is the signal awaited
# in a process that has lost another, before it calls that a fault.
SIGNAL_SECONDS = 2.0


@dataclass(frozen=True)
class World:
    """One of `size` processes, number `rank`; number 0 alone writes files and the console."""

    rank: int = 0
    size: int = 1
    timeout: float = 0.0  # seconds that a process waits for the others
    # What a launcher wants called in every process after each checkpoint-N.
    on_checkpoint: Callable[[Path], None] | None = field(default=None, kw_only=True)

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def part(self, n: int) -> range:
        """Which of `n` things are this process's: neighbours, as many as any other has, or one
        more or less."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; anything that can be pickled, without tensors on a
        GPU."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with self.lost_peer_stops():
            dist.all_gather_object(found, value)
        return found

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place; the same bits in each of them."""
        return self._reduce(x, "SUM")

    def max(self, x: Tensor) -> Tensor:
        """The maximum over all processes, in place."""
        return self._reduce(x, "MAX")

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        if self.size > 1 and x.numel():
            import torch.distributed as dist

            with self.lost_peer_stops():
                dist.all_reduce(x, op=getattr(dist.ReduceOp, how))
        return x

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the sum of all processes' gradients.

        One reduction of REDUCED_BYTES of gradients at a time: those of adapters are that few.
        A parameter without a gradient in every process keeps none, so that its optimiser state does
        not change; one with a gradient in some of them counts as 0 in the others.
        """
        if self.size == 1:
            return
        import torch

        there = [any(which) for which in zip(*self.gather(has_gradients(parameters)), strict=True)]
        gradients = []
        for parameter, is_there in zip(parameters, there, strict=True):
            if is_there:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for group in groups(gradients, REDUCED_BYTES):
            exact = any(x.dtype == torch.float64 for x in group)
            dtype = torch.float64 if exact else torch.float32
            parts = [x.flatten().to(dtype) for x in group]
            flat = torch.cat(parts) if len(parts) > 1 else parts[0]  # a large one is not copied
            sums = torch.split(self.sum(flat), [x.numel() for x in group])
            for gradient, own in zip(group, sums, strict=True):
                gradient.copy_(own.view_as(gradient))

    def agree(self, facts: Mapping[str, str], cure: str) -> None:
        """Check that `facts` (name -> digest) are the same in all processes.

        Raises:
            UserError: in every process, which facts differ in which.
        """
        first, *others = self.gather(dict(facts))
        for rank, theirs in enumerate(others, 1):
            differ = [k for k in first | theirs if first.get(k) != theirs.get(k)]
            if differ:
                raise UserError(
                    f"process {rank} of {self.size} has another {', '.join(differ)} than process "
                    f"0; {cure}"
                )

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the block fails in one process by bad input or by stopping, it fails so in all.

        The block may not exchange anything itself.
        """
        failed: Exception | None = None
        try:
            yield
        except (UserError, TrainingStopped) as error:
            if self.size == 1:
                raise
            failed = error
        if self.size == 1:
            return
        said = self.gather(None if failed is None else (type(failed).__name__, str(failed)))
        for rank, word in enumerate(said):
            if word is not None:
                raise (failed if rank == self.rank and failed else retold(*word))

    def on_main(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function` in process 0; the others wait for its result, or for its failure."""
        if self.size == 1:
            return function(*args)
        result = None
        with self.together():
            if self.main:
                result = function(*args)
        found: T = self.gather(result)[0]  # type: ignore[assignment]
        return found

    def report_checkpoint(self, folder: Path) -> None:
        """Tell the launcher, in every process, that process 0 has written a checkpoint."""
        if self.on_checkpoint is not None:
            self.on_checkpoint(folder)

    @contextmanager
    def lost_peer_stops(self) -> Iterator[None]:
        """Turn the failure of an exchange into one line.

        Raises:
            TrainingStopped: a process has ended, or did not come within the timeout.
        """
        try:
            yield
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
            time.sleep(SIGNAL_SECONDS)  # in which a signal to all raises Interrupted
            raise TrainingStopped(
                f"process {self.rank} of {self.size} has lost another, which has ended, or has not "
                f"answered for {self.timeout:g} s (ddp_timeout); look at what that one said; "
                "resume_from_checkpoint: true goes on from the last checkpoint"
            ) from None


ALONE: Final = World()


def groups(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Neighbours of at most `size` bytes in float32, and larger ones alone."""
    group, held = list[Any](), 0
    for tensor in tensors:
        own = tensor.numel() * max(tensor.element_size(), 4)
        if group and held + own > size:
            yield group
            group, held = [], 0
        group.append(tensor)
        held += own
    if group:
        yield group


def has_gradients(parameters: Sequence[nn.Parameter]) -> list[bool]:
    """Which of the parameters have a gradient."""
    return [p.grad is not None for p in parameters]


def retold(kind: str, message: str) -> UserError | TrainingStopped:
    """The failure of another process, which prints it."""
    error = UserError(message) if kind == "UserError" else TrainingStopped(message)
    error.told = True
    return error


@contextmanager
def join(config: Config, on_checkpoint: Callable[[Path], None] | None = None) -> Iterator[World]:
    """Meet the other processes that the launcher started; alone, that is a world of size 1.

    A process group that the launcher has made is used, and left to it. Inside the block a process
    other than 0 prints nothing on the console.

    Raises:
        TrainingStopped: the others have not come within `ddp_timeout`.
    """
    found = launched()
    if found is None:
        yield World(on_checkpoint=on_checkpoint)
        return
    import torch
    import torch.distributed as dist

    from fastppo.run.console import console

    on_gpu = torch.cuda.is_available() and not config.use_cpu
    if on_gpu:
        check_gpus(found, torch.cuda.device_count())
        torch.cuda.set_device(found.local_rank)
    joined = dist.is_initialized()
    try:
        if not joined:
            dist.init_process_group(
                backends(gpus=on_gpu),
                timeout=timedelta(seconds=config.ddp_timeout),
                rank=found.rank,
                world_size=found.size,
            )
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TrainingStopped(
            f"process {found.rank} of {found.size} has not met the others at {place} within "
            f"{config.ddp_timeout:g} s (ddp_timeout): {one_line(error)[:200]}; check that process "
            "0 runs there, that the port is free, and what the others said"
        ) from None
    was_quiet, console.quiet = console.quiet, found.rank > 0
    try:
        yield World(found.rank, found.size, config.ddp_timeout, on_checkpoint=on_checkpoint)
    finally:
        console.quiet = was_quiet
    if not joined:
        dist.destroy_process_group()  # after a failure the others may be gone, and it would wait


def backends(*, gpus: bool) -> str:
    """What torch.distributed talks through: gloo, and NCCL for tensors on GPUs."""
    return "cpu:gloo,cuda:nccl" if gpus else "gloo"


def check_gpus(found: Launched, count: int) -> None:
    """Refuse more processes on a machine than it has GPUs."""
    if found.local_rank >= count:
        raise UserError(
            f"LOCAL_RANK: is {found.local_rank}, and {count} GPUs are visible: a process needs one "
            f"of its own; start {count} on this machine (--nproc-per-node), or set use_cpu: true"
        )
