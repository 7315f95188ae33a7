"""Runs a piece of training with another package's functions and with ours, each in a process.

The examples of other people's trainers import it; it has nothing of fastppo.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

# A piece of training: whether with our functions, then what else it needs. It returns the losses
# and the CPU seconds, over all threads, of the part which differs.
Train = Callable[..., tuple[list[float], float]]


class Measured(NamedTuple):
    """What one way of training took."""

    losses: list[float]
    seconds: float  # by the clock, with imports and the making of the model
    cpu: float  # of the process's CPU time, the same
    part: float  # of its CPU time, the part that differs
    peak_mib: float  # largest resident set of the process, with its packages and its model


def measure(train: Train, ours: bool, *given: Any) -> Measured:
    """Train in this process, which has done nothing before."""
    start = time.perf_counter()
    losses, part = train(ours, *given)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Measured(losses, time.perf_counter() - start, time.process_time(), part, peak)


def send(answer: Connection, *given: Any) -> None:
    """Send what `measure` returns to the process that asked."""
    answer.send(tuple(measure(*given)))


def one_way(train: Train, ours: bool, *given: Any) -> Measured:
    """What `measure` returns, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(theirs, train, ours, *given))
    process.start()
    theirs.close()
    try:
        return Measured(*mine.recv())
    except EOFError:
        raise SystemExit("the process ended before it had an answer; its error is above") from None
    finally:
        process.join()


def compare(package: str, part: str, train: Train, *given: Any) -> None:
    """Print both ways, one after the other."""
    for name, ours in ((package, False), ("fastppo", True)):
        found = one_way(train, ours, *given)
        shown = ", ".join(f"{loss:.5f}" for loss in found.losses)
        print(
            f"{name:10}  losses {shown};  {found.seconds:.1f} s;  CPU time {found.cpu:.1f} s, "
            f"of it {found.part:.2f} in {part};  peak {found.peak_mib:.0f} MiB",
            flush=True,
        )
