"""Allocations and releases of a profile, in order, without what a GEMM of a library holds inside.

A processor without bf16 instructions multiplies bf16 matrices by way of float32: there oneDNN takes
scratch from torch's allocator, a float32 copy of the result, inside `aten::mm` and its like. It
depends on the processor and not on the model, so neither the plan nor a comparison counts it. What
a model converts itself, outside of the GEMM, is counted however short its life is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastppo.ops import workspace


def grouped_keys_are_fused() -> bool:
    """Whether attention with grouped keys keeps no scores on a CPU."""
    query, key = torch.zeros(1, 4, 64, 16), torch.zeros(1, 2, 64, 16)
    return torch._fused_sdp_choice(query, key, key, is_causal=True, enable_gqa=True) != 0


NEEDS_GROUPED_KEYS = pytest.mark.skipif(
    not grouped_keys_are_fused(),
    reason=f"torch {torch.__version__} keeps the scores of grouped keys on a CPU; docs/memory.md",
)
GEMMS = {f"aten::{name}" for name in ("mm", "mm_", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")}


def memory_events(event: Any) -> Iterator[Any]:
    """Memory events inside `event`, but for pairs of a GEMM's own scratch."""
    own = [child for child in event.children if child.name == "[memory]"]
    scratch: set[int] = set()
    if event.name in GEMMS:
        taken: dict[int, Any] = {}
        for child in own:
            pointer = child.extra_fields.ptr
            if child.extra_fields.alloc_size > 0:
                taken[pointer] = child
            elif pointer in taken:
                scratch |= {id(child), id(taken.pop(pointer))}
    yield from (child for child in own if id(child) not in scratch)
    for child in event.children:
        if child.name != "[memory]":
            yield from memory_events(child)


@contextmanager
def profiled_allocations() -> Iterator[SimpleNamespace]:
    """`changes`: bytes of each allocation (above 0) and release (below), in order; `peak`: the most
    bytes at a time beyond those at the start; `end`: those at the end.
    """
    found = SimpleNamespace()
    gc.collect()  # what earlier code left in cycles must not go while this counts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    results = profiler.profiler.kineto_results
    top = SimpleNamespace(name="", children=results.experimental_event_tree())
    events = sorted(memory_events(top), key=lambda event: event.start_time_ns)
    found.changes = [event.extra_fields.alloc_size for event in events]
    now = found.peak = 0
    for change in found.changes:
        now += change
        found.peak = max(found.peak, now)
    found.end = now


def allocations_of(call: Callable[[], Any]) -> list[int]:
    """`changes` of a call that begins with no workspace left by an earlier one."""
    workspace.release()
    with profiled_allocations() as found:
        call()
    return list(found.changes)
