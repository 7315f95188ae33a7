"""Imports, and one launch of every operator's kernels: what fails here fails everywhere."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch

from benchmarks.gpu.plan import Add, Plan
from benchmarks.gpu.timing import failure
from benchmarks.harness import TOLERANCE, distance
from tests.ops.oracle import run
from tests.ops.registry import OPS, Op, Shape

SHAPE = Shape(n=16, vocab=1024, hidden=64, batch=4)
TOY = Shape(n=3, vocab=40, hidden=4, batch=2)


def measure(plan: Plan, add: Add) -> list[str]:
    """A row for the imports and one for each operator; returns what failed."""
    add(what="imports", seconds=plan.imported)
    if plan.cuda:
        torch.zeros(1, device=plan.device)  # the context, once and not in eleven threads
    with ThreadPoolExecutor(plan.workers) as pool:
        found = []
        for done in as_completed([pool.submit(launch, op, plan) for op in OPS.values()]):
            found.append(done.result())
            add(**found[-1])
    return [f"{row['what']}: {row['note']}" for row in found if "note" in row]


def launch(op: Op, plan: Plan) -> dict[str, Any]:
    """Forward and backward of an operator, compilation included, against its definition."""
    given = op.make_inputs(SHAPE if plan.cuda else TOY, torch.float32, 0)
    inputs = {k: x.to(plan.device) if isinstance(x, torch.Tensor) else x for k, x in given.items()}
    row: dict[str, Any] = {"what": op.name}
    began = time.perf_counter()
    try:
        values, grads = run(op, op.function, inputs, backend="triton")
        row["seconds"] = round(time.perf_counter() - began, 2)
        wanted, wanted_grads = run(op, op.reference, given)
        row["error"] = distance([*values, *grads], [*wanted, *wanted_grads])
        if not row["error"] <= TOLERANCE[torch.float32]:
            row["note"] = f"a wrong answer: off by {row['error']:.1e}"
    except Exception as error:
        row["note"] = failure(error)
    return row
