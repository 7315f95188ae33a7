"""Contenders on the device: the answer first, then the clock in turns, plain and as CUDA graphs.

A plain call costs what the host needs to launch it; a CUDA graph has its kernels alone.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.plan import Add, Plan
from benchmarks.harness import TOLERANCE, distance

Call = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Args:
        name: as in the table.
        call: what is timed.
        answer: gives the tensors to compare with those of `want`; None for a bound.
        want: gives the right ones; the answer of another contender is no reason to trust it.
        moved: bytes that it must at least move; None if its share of a copy means nothing.
        flops: of the GEMMs that it must at least do.
        ours: whether a wrong answer, or a failure, is a defect of this project.
        graph: whether it may be captured as a CUDA graph.
        tolerance: of the answer; None is that of the dtype.
    """

    name: str
    call: Call
    answer: Callable[[], Sequence[Tensor]] | None = None
    want: Callable[[], Sequence[Tensor]] | None = None
    moved: int | None = None
    flops: int | None = None
    ours: bool = False
    graph: bool = True
    tolerance: float | None = None


def compile_all(calls: Sequence[Call], plan: Plan) -> None:
    """Call each once, in several threads: Triton compiles outside of Python's lock."""
    with ThreadPoolExecutor(plan.workers) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.exception()  # whoever calls it next gets the failure again
    if plan.cuda:
        torch.cuda.synchronize()


def failure(error: Exception) -> str:
    """The error in one line."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text}"[:300]


def measure(
    contenders: Sequence[Contender],
    plan: Plan,
    add: Add,
    fields: dict[str, Any],
    dtype: torch.dtype,
    bound: str | None = None,
) -> list[str]:
    """Write a row for each contender; returns the names of ours that are wrong or fail.

    `bound` is the contender whose speed, in bytes a second, the shares are of.
    """
    if plan.warm:
        for contender in contenders:
            with suppress(Exception):  # whoever measures it gets the failure again
                contender.call()
        return []
    wrong, rows, running = [], {}, []
    for contender in contenders:
        row: dict[str, Any] = {**fields, "what": contender.name, "ours": contender.ours}
        rows[contender.name] = row
        try:
            if contender.answer is not None and contender.want is not None:
                row["error"] = distance(contender.answer(), contender.want())
                tolerance = contender.tolerance or TOLERANCE[dtype]
                if not row["error"] <= tolerance:
                    raise ValueError(f"a wrong answer: off by {row['error']:.1e}")
            contender.call()
            row["peak_bytes"] = peak_bytes(contender.call, plan)
        except Exception as error:  # a peer that breaks is a line of the table, not its end
            row["note"] = failure(error)
            if contender.ours:
                wrong.append(f"{contender.name}: {row['note']}")
            continue
        running.append(contender)
    plain = in_turns({c.name: c.call for c in running}, plan)
    for name, times in plain.items():
        rows[name] |= spread("ms", times)
    graphs = captured([c for c in running if c.graph], plan)
    for name, times in in_turns(graphs, plan).items():
        rows[name] |= spread("graph_ms", times)
    shares(rows, running, bound)
    for row in rows.values():
        add(**row)
    return wrong


def shares(
    rows: dict[str, dict[str, Any]], running: Sequence[Contender], bound: str | None
) -> None:
    """Fill in the shares of the bound's speed, and TFLOP/s."""
    by_name = {contender.name: contender for contender in running}
    for name, contender in by_name.items():
        row = rows[name]
        if contender.flops:
            row["tflops"] = contender.flops / row["ms"] / 1e9
        if contender.moved is None or bound not in by_name:
            continue
        for key, share in (("ms", "share"), ("graph_ms", "graph_share")):
            if key in row and key in rows[bound]:
                least = rows[bound][key] * contender.moved / (by_name[bound].moved or 1)
                row[share] = round(least / row[key], 3)


def spread(key: str, times: Sequence[float]) -> dict[str, float]:
    """Median, least and most of some milliseconds."""
    found = (statistics.median(times), min(times), max(times))
    names = (key, f"{key}_min", f"{key}_max")
    return {name: round(value, 5) for name, value in zip(names, found, strict=True)}


def in_turns(calls: dict[str, Call], plan: Plan) -> dict[str, list[float]]:
    """Milliseconds of every call, one after the other, the L2 cache washed before each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    wash = torch.empty(plan.wash, dtype=torch.uint8, device=plan.device)
    gc.collect()
    for turn in range(plan.rounds):
        names = list(calls)
        start = turn % max(len(names), 1)  # nobody always runs after the same one
        for name in [*names[start:], *names[:start]]:
            wash.zero_()
            times[name].append(milliseconds(calls[name], plan))
    return times


def milliseconds(call: Call, plan: Plan) -> float:
    """What one call takes, by the device's clock."""
    if not plan.cuda:
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def captured(contenders: Sequence[Contender], plan: Plan) -> dict[str, Call]:
    """Replays of the calls as CUDA graphs; those that cannot be captured are left out."""
    if not plan.cuda:  # the walk without the capture
        return {contender.name: contender.call for contender in contenders}
    found: dict[str, Call] = {}
    pool = torch.cuda.graph_pool_handle()  # replays never overlap, so that they share memory
    for contender in contenders:
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                contender.call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                contender.call()
            graph.replay()
            torch.cuda.synchronize()
        except Exception as error:  # it waits for the device, say
            print(f"{contender.name}: no CUDA graph: {failure(error)}", flush=True)
            continue
        found[contender.name] = graph.replay
    return found


def peak_bytes(call: Call, plan: Plan) -> int:
    """The most that is allocated during a call, above what was there."""
    if not plan.cuda:
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
