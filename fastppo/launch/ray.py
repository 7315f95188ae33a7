"""`python -m fastppo.launch.ray CONFIG --workers N`: a run of several processes on a Ray cluster.

Ray Train's TorchTrainer starts the processes, and starts them again if one is lost; each is what
`fastppo-train` is under torchrun. Which checkpoint a restart begins from is in ray_worker.py.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from fastppo import packages
from fastppo.errors import Interrupted, TrainingStopped, UserError, note, one_line
from fastppo.run.commandline import Answered, Parser, quieten

if TYPE_CHECKING:
    from fastppo.config import Config

COMMAND: Final = "fastppo.launch.ray"
LEAST: Final = "2.60"  # the first version of Ray with which this has run
USAGE = f"python -m {COMMAND} CONFIG [key=value ...] --workers N [options]"
ABOUT = "A run of fastppo-train in several processes on a Ray cluster (docs/scaling.md)."
END = """
Without --address a Ray is started on this machine, for this run. output_dir and the
data have to be on a file system that the driver and all workers share. A restart
begins from the newest complete checkpoint-N in output_dir. Exit codes: 0 done, 1 the
run failed more often than --max-failures, 2 bad input (nothing was written), 130 and
143 interrupted (Ctrl-C, SIGTERM); resume_from_checkpoint: true goes on.
"""
GOES_ON: Final = "resume_from_checkpoint: true goes on from the newest checkpoint in output_dir"
LOG_SECONDS = 1.0  # in which the last lines of the workers reach the driver


def main(argv: Sequence[str] | None = None) -> int:
    """Run one configuration on Ray; an error that the user can correct is one line, exit code 2."""
    try:
        launch(read(argv))
    except Answered:
        return 0
    except UserError as error:
        print(f"{COMMAND}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"{COMMAND}: stopped: {one_line(error)}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        name = signal.Signals(stop.signal).name
        print(f"{COMMAND}: stopped by {name}; {one_line(stop)}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print(f"{COMMAND}: interrupted", file=sys.stderr)
        return 130
    return 0


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line: words (CONFIG and overrides) and the options."""
    parser = Parser(f"python -m {COMMAND}", usage=USAGE, description=ABOUT, epilog=END)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG",
        help="as fastppo-train reads it; key=value behind it overrides a key",
    )
    add = parser.options.add_argument
    add("--workers", type=int, metavar="N", help="processes of the run, each on one device")
    add("--address", help="of a running cluster, as auto or host:6379; else Ray starts here")
    add(
        "--max-failures",
        type=int,
        default=3,
        metavar="K",
        help="restarts of all workers after one was lost; -1 is without limit, default 3",
    )
    add(
        "--storage",
        metavar="PATH",
        help="shared folder or URI for Ray Train's own small files; default output_dir/ray",
    )
    add(
        "--gpus-per-worker",
        type=int,
        choices=(0, 1),
        metavar="N",
        help="0 or 1; default 1 where the cluster has GPUs, but 0 with use_cpu: true",
    )
    add(
        "--cpus-per-worker",
        type=int,
        default=1,
        metavar="N",
        help="CPUs that Ray reserves, and threads of a worker; default 1",
    )
    options = parser.parse(argv)
    if missing := packages.missing_for_training():
        raise UserError(missing)
    if not options.words:
        raise UserError("no CONFIG; name a YAML file, for example examples/demo_ppo.yaml")
    for name, least in (("workers", 1), ("cpus_per_worker", 1), ("max_failures", -1)):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is None:
            raise UserError(f"no {option}; say how many processes share the run, as {option} 2")
        if value < least:
            raise UserError(f"{option}: {value} is wrong; it should be {least} or more")
    return options


def launch(options: argparse.Namespace) -> None:
    """Check the run, start or join Ray, and train until the run ends or fails too often."""
    config = checked(options)
    ray = import_ray()
    connect(ray, options)
    try:
        with interruptible():  # after Ray has set a handler of its own
            gpus = gpus_per_worker(ray, config, options)
            with shared_folder(config, options.storage) as (storage, token):
                fit(config, options, gpus, storage, token)
    finally:
        time.sleep(LOG_SECONDS)
        ray.shutdown()
    print(f"{COMMAND}: finished; {config.output_dir}", flush=True)


def checked(options: argparse.Namespace) -> Config:
    """The configuration with absolute paths, after every check that needs no cluster.

    Raises:
        UserError: what fastppo-train would say, or a start that a restart could not repeat.
    """
    from fastppo.config import load_config
    from fastppo.config.parallel import check_processes
    from fastppo.launch.paths import with_absolute_paths
    from fastppo.run import durable, launch, preflight

    launch.check_one_process(COMMAND, "output_dir")
    config = load_config(options.words[0], options.words[1:])
    check_processes(config, options.workers, "--workers")
    if isinstance(config.resume_from_checkpoint, str):
        raise UserError(
            f"{config.source}: resume_from_checkpoint: a restart begins from the newest complete "
            "checkpoint in output_dir, and so does the first start; set it to true, after removing "
            "those that are newer than the wanted one"
        )
    preflight.check(config, shared=True)
    earlier = durable.checkpoints(Path(config.output_dir))
    if config.trains and not config.resume_from_checkpoint and earlier:
        raise UserError(
            f"{config.source}: output_dir: has {earlier[-1].name} of an earlier run, which a "
            "restart could not tell from its own; remove the checkpoints, name another folder, or "
            "set resume_from_checkpoint: true"
        )
    return with_absolute_paths(config)


def import_ray() -> Any:
    """Ray with its Train.

    Raises:
        UserError: it is not installed, or too old.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Lines of the workers arrive as they are, without another copy as a log record.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    quieten()
    try:
        import ray
        import ray.train.torch
    except ImportError as error:
        raise UserError(
            f"Ray Train is not installed ({one_line(error)}); run: {packages.install('ray')}"
        ) from None
    if packages.numbers(ray.__version__) < packages.numbers(LEAST):
        raise UserError(
            f"ray>={LEAST} is needed, and here is {ray.__version__}; run: {packages.install('ray')}"
        )
    return ray


def address_of(options: argparse.Namespace) -> str | None:
    """Where a cluster runs; None is to start Ray here."""
    return options.address or os.environ.get("RAY_ADDRESS") or None


def connect(ray: Any, options: argparse.Namespace) -> None:
    """Join the cluster at --address (or RAY_ADDRESS), or start Ray on this machine.

    On one machine the processes may be more than its cores, as under torchrun.
    """
    address = address_of(options)
    try:
        if address:
            ray.init(address=address)
        else:
            wanted = options.workers * options.cpus_per_worker
            cpus = max(wanted, os.cpu_count() or 1)
            ray.init(num_cpus=cpus, include_dashboard=False)
    except (ConnectionError, ValueError) as error:
        why = one_line(error)[:200]
        if not address:
            raise TrainingStopped(f"Ray did not start on this machine: {why}") from None
        raise UserError(
            f"--address: no Ray at {address} ({why}); see `ray status`, or leave it out (and "
            "RAY_ADDRESS) to start Ray on this machine"
        ) from None


def gpus_per_worker(ray: Any, config: Config, options: argparse.Namespace) -> int:
    """GPUs of each worker, 0 or 1: by the option, by `use_cpu`, or by what the cluster has.

    Raises:
        UserError: this machine has fewer GPUs than workers, for which Ray would wait. A cluster
            may grow, so there it is a note.
    """
    there = int(ray.cluster_resources().get("GPU", 0))
    if options.gpus_per_worker is None:
        gpus = int(there > 0 and not config.use_cpu)
    else:
        gpus = int(options.gpus_per_worker)
        if gpus and config.use_cpu:
            raise UserError(
                "--gpus-per-worker: is 1, and use_cpu is true; leave one of the two out"
            )
    if gpus * options.workers > there:
        short = f"--workers: is {options.workers}, and Ray has {there} GPUs: a worker needs one"
        if address_of(options) is None:
            raise UserError(f"{short} of its own; start {max(there, 1)}, or set use_cpu: true")
        note(f"{short} of its own, and Ray waits until there are more")
    return gpus


@contextmanager
def shared_folder(config: Config, storage: str | None) -> Iterator[tuple[str, str]]:
    """Make output_dir with a random file, by which the workers know it.

    Yields Ray Train's storage and the file's content. After bad input nothing is left of them.
    """
    from fastppo.launch.ray_worker import token_file
    from fastppo.run.save import prepare_output_dir

    output_dir = Path(config.output_dir)
    made = not output_dir.exists()
    own = storage is None and not (output_dir / "ray").exists()
    if storage is None:
        storage = str(output_dir / "ray")
    elif "://" not in storage:
        storage = os.path.abspath(storage)
    token = secrets.token_hex(8)
    prepare_output_dir(output_dir)
    file = token_file(output_dir, token)
    try:
        file.write_text(token, encoding="utf-8")
        yield storage, token
    except UserError:
        if own:
            shutil.rmtree(storage, ignore_errors=True)
        raise
    finally:
        file.unlink(missing_ok=True)
        if made:
            with suppress(OSError):  # it holds files of the run
                output_dir.rmdir()


def fit(config: Config, options: argparse.Namespace, gpus: int, storage: str, token: str) -> None:
    """Train in the workers.

    Raises:
        UserError: a worker found bad input.
        TrainingStopped: the workers failed more often than they may.
    """
    from ray.train import (
        CheckpointConfig,
        ControllerError,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
        TrainingFailedError,
    )
    from ray.train.torch import TorchConfig, TorchTrainer

    from fastppo.launch.ray_worker import Failures, Task, told, work
    from fastppo.run.world import backends

    if not gpus:  # a worker without a GPU of Ray's takes none
        config = config.model_copy(update={"use_cpu": True})
    resources = {"CPU": options.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    trainer = TorchTrainer(
        work,
        train_loop_config={"task": Task(config, os.getcwd(), token)},
        torch_config=TorchConfig(
            backend=backends(gpus=gpus > 0), timeout_s=int(config.ddp_timeout)
        ),
        scaling_config=ScalingConfig(
            num_workers=options.workers, use_gpu=gpus > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            storage_path=storage,
            failure_config=FailureConfig(max_failures=options.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[Failures(options.max_failures)],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        in_thread(trainer.fit)
    except ControllerError as error:
        if isinstance(error.controller_failure, UserError):
            raise error.controller_failure from None
        raise TrainingStopped(f"Ray Train failed: {one_line(error)[:300]}; {GOES_ON}") from None
    except TrainingFailedError as error:
        failures = told(getattr(error, "worker_failures", {}))
        raise TrainingStopped(
            f"the workers failed more often than --max-failures {options.max_failures}; the last "
            f"time: {failures or one_line(error)[:300]}; {GOES_ON}"
        ) from None


def in_thread(function: Callable[[], object]) -> None:
    """Call `function` in a thread, while this one hears signals.

    In the main thread Ray Train would handle Ctrl-C itself, and Ray's waiting loses what a handler
    raises.
    """
    failed: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failed:
        raise failed[0]


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block the first Ctrl-C or SIGTERM raises Interrupted; the next acts as usual."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        restore()
        raise Interrupted(number, GOES_ON)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as a shell starts a background job
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        restore()


if __name__ == "__main__":
    sys.exit(main())
