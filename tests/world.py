"""Several processes of a run on this machine, forked from one that has imported everything."""

from __future__ import annotations

import json
import os
import pickle
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from fastppo.run.world import ALONE, World
from tests.limits import HANGS
from tests.reliability import runs


class Meeting:
    """Where the threads that stand for the processes of a world leave what they exchange."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=HANGS)
        self.left: list[bytes] = [b""] * size


@dataclass(frozen=True)
class ThreadWorld(World):
    """A process that is a thread: it computes what a process does, and starts in no time."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def gather(self, value: Any) -> list[Any]:
        self.meeting.left[self.rank] = pickle.dumps(value)
        self.meeting.barrier.wait()
        found = [pickle.loads(each) for each in self.meeting.left]
        self.meeting.barrier.wait()
        return found

    def _reduce(self, x: torch.Tensor, how: str) -> torch.Tensor:
        parts = torch.stack(self.gather(x))
        return x.copy_(parts.sum(0) if how == "SUM" else parts.amax(0))


def in_threads(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """What `function(world, *args)` returns in each of `size` threads that share a run."""
    meeting = Meeting(size)

    def one(rank: int) -> Any:
        try:
            return function(ThreadWorld(rank, size, 60.0, meeting), *args)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(one, range(size)))


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells each process."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def as_process(rank: int, size: int, port: int) -> None:
    """Be one of torchrun's processes."""
    os.environ.update(variables(rank, size, port))


def call(
    function: Callable[..., Any],
    rank: int,
    size: int,
    port: int,
    out: Path,
    args: Any,
    seconds: float,
) -> None:
    """In a child: what `function(world, *args)` returns goes into a file."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    world = ALONE
    if size > 1:
        as_process(rank, size, port)
        dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
        world = World(rank, size, seconds)
    torch.save(function(world, *args), out / f"{size}-{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


def results(
    function: Callable[..., Any], size: int, out: Path, *args: Any, seconds: float = 1800.0
) -> list[Any]:
    """What `function(world, *args)` returns in each of `size` processes.

    One that waits for the others longer than `seconds` fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        runs.context.Process(target=call, args=(function, rank, size, port, out, args, seconds))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANGS)
        assert process.exitcode == 0, "see what it said"
    return [torch.load(out / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)]


def prepared(
    rank: int, size: int, port: int, prepare: Callable[..., None] | None, with_: tuple[Any, ...]
) -> None:
    """Before the command in a child."""
    if size > 1:
        as_process(rank, size, port)
    if prepare is not None:
        prepare(rank, *with_)


def start(
    settings: dict[str, Any], size: int, prepare: Callable[..., None] | None = None, *with_: Any
) -> list[BaseProcess]:
    """The command in `size` processes, after `prepare(rank, *with_)` in each."""
    folder = Path(settings["output_dir"]).parent
    (folder / "said.txt").unlink(missing_ok=True)
    port = free_port()
    return [
        runs.start(settings, prepared, rank, size, port, prepare, with_) for rank in range(size)
    ]


def run(
    settings: dict[str, Any], size: int, prepare: Callable[..., None] | None = None, *with_: Any
) -> tuple[list[int], str]:
    """Exit codes by rank, and all that they said."""
    codes = [runs.finish(process) for process in start(settings, size, prepare, *with_)]
    said = Path(settings["output_dir"]).parent / "said.txt"
    return codes, said.read_text(encoding="utf-8")


def summary(settings: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a run's summary.json."""
    path = Path(settings["metrics_dir"]) / "summary.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
