"""python -m benchmarks.learn: train on tasks whose best policy is known; every run leaves a JSON.

A run whose JSON is there with the same settings is not repeated, so what was cut off goes on.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks.learn import page, runs

FOLDER = Path("output/learn")
SHORT = ("compare", "controller", "problems")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.learn", description=__doc__)
    made.add_argument(
        "--only", nargs="+", choices=runs.SECTIONS, default=SHORT, help=f"default {' '.join(SHORT)}"
    )
    made.add_argument("--names", nargs="+", metavar="NAME", help="only runs whose name begins so")
    made.add_argument("--seeds", nargs="+", type=int, default=list(runs.SEEDS))
    made.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    made.add_argument("--minutes", type=float, help="start no run after so long")
    made.add_argument("--quick", action="store_true", help="2 steps of 16: a walk, no measurement")
    made.add_argument("--out", type=Path, default=FOLDER, help=f"for the JSON; default {FOLDER}")
    made.add_argument("--page", action="store_true", help="no run: docs/learning.md of the results")
    return made


def one(run: runs.TrainingRun, folder: Path, quick: bool, command: str) -> str:
    """Train and write the JSON; returns a line about it."""
    found = run.train(quick)
    return f"{runs.save(run, found, folder, command)}: {runs.message(found)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not there yet."""
    argv = sys.argv[1:] if argv is None else argv
    asked = parser().parse_args(argv)
    if asked.page:
        page.write()
        return 0
    command = shlex.join(["python", "-m", "benchmarks.learn", *argv])
    wanted = [
        run
        for name in asked.only
        for run in runs.SECTIONS[name](tuple(asked.seeds))
        if asked.names is None or run.name.startswith(tuple(asked.names))
    ]
    left = [run for run in wanted if not runs.is_done(run, asked.out, asked.quick)]
    print(f"{len(wanted)} runs, {len(wanted) - len(left)} of them done", flush=True)
    end = None if asked.minutes is None else time.monotonic() + 60 * asked.minutes
    rest = (asked.out, asked.quick, command)
    if asked.jobs == 1:
        for number, run in enumerate(left, 1):
            if end is not None and time.monotonic() > end:
                break
            print(f"{number}/{len(left)} {one(run, *rest)}", flush=True)
        return 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(asked.jobs, mp_context=context) as pool:
        futures = [pool.submit(one, run, *rest) for run in left]
        for number, future in enumerate(as_completed(futures), 1):
            print(f"{number}/{len(left)} {future.result()}", flush=True)
            if end is not None and time.monotonic() > end:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
