"""The contenders of `python -m benchmarks ops` under pytest-benchmark, at sizes for a coffee.

    pytest benchmarks --benchmark-only --benchmark-group-by=group

One at a time, in the order in which pytest runs them: the interleaved table is the one to quote.
The answer is checked before anything is timed. Sizes come from FASTPPO_BENCH_N, _V and _D.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.harness import Case, distance
from benchmarks.ops import DTYPES, QUICK_TOKENS, describe, make_case, name_of
from benchmarks.report import machine
from tests.ops.registry import OPS, Shape

SHAPE = Shape(
    n=int(os.environ.get("FASTPPO_BENCH_N", "128")),
    vocab=int(os.environ.get("FASTPPO_BENCH_V", "8192")),
    hidden=int(os.environ.get("FASTPPO_BENCH_D", "256")),
    batch=8,
)


def names() -> list[Any]:
    """Every operator, dtype and contender, those that are not here among them."""
    found = []
    for op in OPS.values():
        for dtype in DTYPES:
            case = make_case(op, QUICK_TOKENS[0], dtype, quick=True)
            for contender in [*(c.name for c in case.contenders), *case.absent]:
                label = f"{op.name}-{name_of(dtype)}-{contender.replace(' ', '_')}"
                found.append(pytest.param(op.name, dtype, contender, id=label))
    return found


@lru_cache(maxsize=1)
def case_of(op: str, dtype: torch.dtype) -> Case:
    """Made once for its contenders, which follow each other."""
    torch._dynamo.reset()
    return make_case(OPS[op], SHAPE, dtype, quick=False)


@pytest.mark.parametrize(("op", "dtype", "name"), names())
def bench(benchmark: Any, op: str, dtype: torch.dtype, name: str) -> None:
    """One operator, one dtype, one contender."""
    case = case_of(op, dtype)
    if name in case.absent:
        pytest.skip(f"{name}: {case.absent[name]}")
    (contender,) = [c for c in case.contenders if c.name == name]
    if contender.answer is not None:
        assert distance(contender.answer(), case.want) <= case.tolerance
    benchmark.group = f"{op}, {name_of(dtype)}"
    benchmark.extra_info.update(
        shape=describe(OPS[op], SHAPE),
        bytes=OPS[op].bytes_moved(SHAPE, dtype),
        flops=OPS[op].flops(SHAPE),
        bound=contender.bound,
        **machine(),
    )
    benchmark.pedantic(contender.call, rounds=15, warmup_rounds=2)
