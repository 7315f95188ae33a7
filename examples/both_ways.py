"""Runs a piece of training with another package's functions and with ours, each in a process.

The examples of other people's trainers import it; it has nothing of fastppo.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

# What is compared: the name of a loss, a gradient's norm or the like -> its value in each step.
Series = dict[str, list[float]]
# A piece of training: whether with our functions, then what else it needs. It returns what is
# compared, and the CPU seconds, over all threads, of the part which differs.
Train = Callable[..., tuple[Series, float]]


class Measured(NamedTuple):
    """What one way of training took."""

    series: Series
    seconds: float  # by the clock, with imports and the making of the model
    cpu: float  # of the process's CPU time, the same
    part: float  # of its CPU time, the part that differs
    peak_mib: float  # largest resident set of the process, with its packages and its model


def measure(train: Train, ours: bool, *given: Any) -> Measured:
    """Train in this process, which has done nothing before."""
    start = time.perf_counter()
    series, part = train(ours, *given)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Measured(series, time.perf_counter() - start, time.process_time(), part, peak)


def size(values: list[float]) -> float:
    """How large a quantity is: the median over the steps of its absolute value."""
    return statistics.median(map(abs, values))


def difference(theirs: list[float], ours: list[float]) -> float:
    """The largest difference of two series in any step, as a share of the first one's size."""
    apart = [abs(x - y) for x, y in zip(theirs, ours, strict=True)]
    largest = max(apart, key=lambda x: (math.isnan(x), x))  # max alone passes over NaN
    return largest / size(theirs) if size(theirs) > 0 else math.inf


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
    """Print both ways, one after the other, and how far they are apart."""
    both = []
    for name, ours in ((package, False), ("fastppo", True)):
        found = one_way(train, ours, *given)
        both.append(found.series)
        print(
            f"{name}: {found.seconds:.1f} s;  CPU time {found.cpu:.1f} s, of it {found.part:.2f} "
            f"in {part};  peak {found.peak_mib:.0f} MiB"
        )
        for key, values in found.series.items():
            print(f"  {key:12} {' '.join(f'{x:.5f}' for x in values)}", flush=True)
    theirs, mine = both
    apart = {key: difference(values, mine[key]) for key, values in theirs.items()}
    shown = ", ".join(f"{key} {value:.0e}" for key, value in apart.items())
    print(f"largest difference of a step, as a share of the median: {shown}")
