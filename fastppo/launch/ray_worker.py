"""What each worker of `python -m fastppo.launch.ray` runs: the command's own code, as by torchrun.

Ray Train restarts all workers after a failure. Each time the run begins from the newest complete
checkpoint-N in output_dir, which all workers see, and without one from its beginning. What
`ray.train.get_checkpoint()` returns only points to such a folder, and never decides: a checkpoint
can have been written and not yet been reported when a worker is lost.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import ray.train

from fastppo import cli
from fastppo.errors import TrainingStopped, UserError, note, one_line
from fastppo.run import durable
from fastppo.run.launch import launched
from fastppo.run.world import World

if TYPE_CHECKING:
    from fastppo.config import Config

POINTER: Final = "checkpoint.json"  # all that is in a checkpoint of Ray's


@dataclass(frozen=True)
class Task:
    """What the driver gives to each worker."""

    config: Config  # with absolute paths
    folder: str  # the driver's working directory
    token: str  # what the driver has written below output_dir


def work(task: dict[str, Any]) -> None:
    """Run one process of the run; `task` holds a Task, since Ray Train passes a dictionary."""
    given: Task = task["task"]
    config = given.config
    check_shared(Path(config.output_dir), given.token)
    with suppress(OSError):  # a worker on another machine may lack it
        os.chdir(given.folder)
    found = launched()
    world = World() if found is None else World(found.rank, found.size, config.ddp_timeout)
    cli.run(resumed(config, world), report)


def token_file(output_dir: Path, token: str) -> Path:
    """The file by which workers know the driver's output_dir."""
    return output_dir / f".driver-{token}"


def check_shared(output_dir: Path, token: str) -> None:
    """Check that this worker sees the output_dir into which the driver has written.

    Raises:
        UserError: it does not; checkpoints would be lost with the machine that wrote them.
    """
    with suppress(OSError):
        if token_file(output_dir, token).read_text(encoding="utf-8") == token:
            return
    raise UserError(
        f"output_dir: {output_dir} on {platform.node()} is not the driver's folder: name one on a "
        "file system that the driver and all workers share, under the same path"
    )


def newest(output_dir: Path) -> Path | None:
    """The newest checkpoint-N that is complete, or None."""
    folder, _ = durable.newest_complete(output_dir, hashes=True)
    return folder


def resumed(config: Config, world: World) -> Config:
    """`config` for this start: from the newest complete checkpoint, else from the beginning.

    Process 0 chooses it. The driver has checked output_dir before it wrote into it.
    """
    changes: dict[str, Any] = {"overwrite_output_dir": True, "resume_from_checkpoint": None}
    if config.trains:
        folder = world.on_main(newest, Path(config.output_dir))
        changes["resume_from_checkpoint"] = None if folder is None else str(folder)
        reported = last_reported()
        if reported is not None and (folder is None or step_of(folder) < step_of(reported)):
            start = "its beginning" if folder is None else str(folder)
            note(f"{reported} was reported, but is not complete: the run goes on from {start}")
    return config.model_copy(update=changes)


def step_of(folder: Path) -> int:
    """N of checkpoint-N."""
    return int(folder.name.rpartition("-")[2])


def last_reported() -> Path | None:
    """The folder to which Ray's latest checkpoint of this run points, or None."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as place:
        return Path(json.loads(Path(place, POINTER).read_text(encoding="utf-8"))["checkpoint"])


def report(folder: Path) -> None:
    """Report a checkpoint to Ray Train, in every worker; the first gives a file with its path.

    The folder itself stays where it is: Ray copies what it is given into its own storage.
    """
    facts = {"step": step_of(folder), "checkpoint": str(folder)}
    if ray.train.get_context().get_world_rank() > 0:
        ray.train.report(facts)
        return
    with TemporaryDirectory() as place:
        Path(place, POINTER).write_text(json.dumps(facts) + "\n", encoding="utf-8")
        ray.train.report(facts, checkpoint=ray.train.Checkpoint.from_directory(place))


class Failures(ray.train.UserCallback):  # type: ignore[misc]  # Ray has no types
    """Prints a line for each failure, and ends a run whose input is wrong without a restart.

    Ray Train calls it in its controller, which restarts the workers after any exception of theirs
    but not after one of its own.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Print what the workers failed by.

        Raises:
            ControllerError: one of them found bad input, which another start would find again.
        """
        for error in worker_exceptions.values():
            if isinstance(error, UserError):
                raise ray.train.ControllerError(error)
        self.count += 1
        most = "" if self.limit < 0 else f" of {self.limit}"
        print(
            f"fastppo.launch.ray: failure {self.count}{most}: {told(worker_exceptions)}; "
            + (
                "no more are allowed (--max-failures)"
                if 0 <= self.limit < self.count
                else "the workers start again from the newest complete checkpoint in output_dir"
            ),
            flush=True,
        )


def told(failures: dict[int, Exception]) -> str:
    """What workers failed by, in a line; a worker that lost another is not its cause."""
    others = {
        rank: error for rank, error in failures.items() if not isinstance(error, TrainingStopped)
    }
    found = []
    for rank, error in (others or failures).items():
        cause = getattr(error, "health_check_failure", error)  # Ray wraps what it found dead
        found.append(f"worker {rank}: {one_line(cause)[:160] or type(cause).__name__}")
    return ", ".join(found)
