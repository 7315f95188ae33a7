"""Contenders against each other: first the answer, then the memory, then the clock, in turns.

All of them run in one process, one at a time, on the same inputs. A bound is a contender too: a
copy, or the bare GEMMs, timed among the others.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Absent
from fastppo.ops import workspace
from fastppo.ops.backend import BACKENDS, choose

Call = Callable[[], Any]
ROUNDS = 7
# Calls shorter than this are timed several at a time.
SHORTEST = 2e-3
# By dtype of the inputs: of the largest entry of a result. A bf16 gradient is rounded at 2^-9.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Contender:
    """What runs against others.

    Args:
        name: as in the table.
        call: what is timed.
        answer: gives the tensors to compare with the oracle's; None for a bound, which has none.
        bound: name of the contender against which it is measured; None for nothing.
        ours: whether a wrong answer is a defect of this project.
        rivals: contenders of the same name here give the same result, and are compared with each
            other; None for those of the same bound.
    """

    name: str
    call: Call
    answer: Callable[[], Sequence[Tensor]] | None = None
    bound: str | None = None
    ours: bool = False
    rivals: str | None = None


@dataclass
class Case:
    """One operator at one size: its contenders and what they have to answer.

    Args:
        fields: what the case is, for every row of it.
        want: the oracle's answer, made in float32.
        tolerance: of an answer, relative to the largest entry of the oracle's.
        work: how many times the bound's work the operator must at least do.
        absent: contenders that are not here, and why.
    """

    fields: dict[str, Any]
    want: Sequence[Tensor]
    tolerance: float
    work: float = 1.0
    contenders: list[Contender] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, contender: Contender) -> None:
        self.contenders.append(contender)

    def try_peer(self, name: str, make: Callable[[], Contender]) -> None:
        """Add a peer, or the note that it is not here."""
        try:
            self.add(make())
        except (Absent, ImportError) as why:
            self.absent[name] = str(why)


def backends(op: str, *tensors: Tensor) -> tuple[list[str], dict[str, str]]:
    """Backends that run these inputs, and why the others do not."""
    found, others = [], {}
    for name in BACKENDS:
        if name == "triton" and tensors[0].device.type == "cpu":
            others[name] = "needs a GPU; its interpreter is no contender"
            continue
        try:
            choose(op, name, *tensors)
        except ValueError as why:
            others[name] = str(why)
        else:
            found.append(name)
    return found, others


def compiled(function: Callable[..., Any], quick: bool) -> Callable[..., Any]:
    """torch.compile, without its code generation where only the walk counts."""
    return torch.compile(function, dynamic=False, backend="eager" if quick else "inductor")


def distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest error, as a share of the largest entry of the result in which it is."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = a.detach().float(), b.detach().float()
        if a.shape != b.shape:
            return float("inf")
        if not b.numel():
            continue
        error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        worst = error if not error <= worst else worst  # NaN is the worst
    return worst


def allocations(call: Call) -> list[int]:
    """Bytes of each allocation (above 0) and release (below) of tensors during a call, in order.

    They are the allocator's own events, neither samples nor the process's size. What a library
    takes past torch's allocator is not among them.
    """
    workspace.release()  # what an earlier call left would not be seen
    activities = [torch.profiler.ProfilerActivity.CPU]
    profile = torch.profiler.profile(activities=activities, profile_memory=True)
    with quiet():
        profile.start()
    try:
        call()
    finally:
        with quiet():
            profile.stop()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@contextmanager
def quiet() -> Iterator[None]:
    """The process's own stderr turned away: some builds of the profiler log each start and stop."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(events: Sequence[int]) -> int:
    """Most that lived at a time above what was there; releases of older tensors do not count."""
    live = floor = peak = 0
    for event in events:
        live += event
        floor = min(floor, live)
        peak = max(peak, live - floor)
    return peak


def seconds(call: Call, number: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - began) / number


def measure(
    case: Case, rounds: int = ROUNDS, timing: AbstractContextManager[Any] | None = None
) -> list[dict[str, Any]]:
    """A row for every contender: its answer's error, its peak memory, its times.

    `timing` is entered for as long as the clock runs.
    """
    rows, running = [], []
    for contender in case.contenders:
        row = {**case.fields, "what": contender.name, "status": "timed", "ours": contender.ours}
        rows.append(row)
        try:
            if contender.answer is not None:
                row["error"] = distance(contender.answer(), case.want)
                if not row["error"] <= case.tolerance:
                    row["status"], row["note"] = "wrong", f"the limit is {case.tolerance:g}"
                    continue
            contender.call()  # caches, compilation
            row["peak_bytes"] = peak_bytes(allocations(contender.call))
            number = max(1, round(SHORTEST / max(seconds(contender.call), 1e-7)))
        except Exception as failure:  # a peer that breaks is a line of the table, not its end
            text = (str(failure).strip() or "no message").splitlines()[0]
            row["status"], row["note"] = "failed", f"{type(failure).__name__}: {text}"
            continue
        running.append((contender, row, number))
    times: dict[str, list[float]] = {contender.name: [] for contender, _, _ in running}
    gc.collect()
    gc.disable()
    try:
        with timing or nullcontext():
            for turn in range(rounds):
                start = turn % max(len(running), 1)  # nobody always runs after the same one
                for contender, _, number in [*running[start:], *running[:start]]:
                    times[contender.name].append(1e3 * seconds(contender.call, number))
    finally:
        gc.enable()
    for contender, row, _ in running:
        taken = times[contender.name]
        row |= {"ms": statistics.median(taken), "min_ms": min(taken), "max_ms": max(taken)}
        if contender.bound in times:
            least = case.work * statistics.median(times[contender.bound])
            row["bound"], row["share"] = contender.bound, least / row["ms"]
            row["rivals"] = contender.rivals or contender.bound
    return rows + [
        {**case.fields, "what": name, "status": "absent", "note": why}
        for name, why in case.absent.items()
    ]
