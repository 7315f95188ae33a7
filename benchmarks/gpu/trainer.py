"""Stages rm and ppo of the trainer itself on a 7B with all four roles, and the usual way beside.

Responses are sampled once: what differs between the ways is scoring and update, on that rollout.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.gpu.model import Size, ppo_config, random_weights, rm_config, size_of, write_files
from benchmarks.gpu.phases import GIB, Phases
from benchmarks.gpu.plan import Add, Plan
from benchmarks.gpu.timing import failure
from benchmarks.gpu.usual import usual
from fastppo.config import Config
from fastppo.memory.plan import plan_config
from fastppo.memory.retry import OutOfMemory, out_of_memory, release_memory
from fastppo.offload.activations import wrap
from fastppo.ppo import trainer
from fastppo.rm import train as reward_model
from fastppo.run.preflight import check
from fastppo.types import Rollout

# The most important first.
MODES = ("checkpoint", "checkpoint+offload", "offload", "none")
Row = dict[str, Any]


def measure(plan: Plan, add: Add) -> list[str]:
    """A row for each way; running out of memory is a row too."""
    size = size_of(plan)
    fields = {"length": size.length, "new_tokens": size.new_tokens, "rows": size.rows}
    wrong = []
    with tempfile.TemporaryDirectory() as folder, random_weights(size):
        write_files(size, Path(folder))
        for way, part in parts(size, Path(folder)):
            try:
                row = part()
            except Exception as error:
                row = {"note": failure(error)}
                if not isinstance(error, OutOfMemory) and not out_of_memory(error):
                    wrong.append(f"{way}: {row['note']}")
            del part
            release_memory()
            add(way=way, **fields, **row)
    return wrong


def parts(size: Size, folder: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Each way, and what measures it."""
    yield "rm", partial(rm, size, rm_config(size, folder))
    config = ppo_config(size, folder, reward_model=str(folder / "reward"))
    state = trainer.init_state(config, check(config))
    rollouts: list[Rollout] = []
    # Libraries are loaded in it, kernels compiled, the optimiser's state made.
    yield "ppo, first step", partial(first_step, size, state, rollouts)
    if not rollouts:
        return
    for mode in MODES[:2]:
        yield f"ppo, {mode}", partial(step, size, state, mode, rollouts[0])
    yield "ppo, the usual way", partial(usual, state, rollouts[0], size.device == "cuda")
    for mode in MODES[2:]:
        yield f"ppo, {mode}", partial(step, size, state, mode, rollouts[0])


def rm(size: Size, config: Config) -> Row:
    """Two optimiser steps of stage rm, as a whole: its loop is transformers'."""
    clock = Phases(size.device == "cuda")
    with clock("run"):
        reward_model.run(config, check(config))
    results = json.loads((Path(config.output_dir) / "all_results.json").read_text())
    seconds = round(results["train_runtime"], 3)
    return {"phases": {"2 steps": {**clock.found["run"], "seconds": seconds}}} | planned_rm(
        config, size
    )


def planned_rm(config: Config, size: Size) -> Row:
    """The plan's peak of stage rm."""
    plan, _ = plan_config(config, "gpu" if size.device == "cuda" else "cpu")
    return {"planned_gib": round(plan.step_peak / GIB, 2)}


def first_step(size: Size, state: trainer.State, rollouts: list[Rollout]) -> Row:
    """A step with its rollout, which is kept."""
    sample = trainer.sample

    def keep(*args: Any, **more: Any) -> Rollout:
        rollouts[:] = [sample(*args, **more)]
        return rollouts[0]

    wrap(state.roles.base, MODES[0])
    return timed_step(size, state, keep) | planned(state, MODES[0])


def step(size: Size, state: trainer.State, mode: str, rollout: Rollout) -> Row:
    """A step on the rollout that there is."""
    wrap(state.roles.base, mode)
    row = timed_step(size, state, lambda *_, **__: rollout)
    del row["phases"]["rollout"]
    return row | planned(state, mode)


def timed_step(size: Size, state: trainer.State, sample: Callable[..., Rollout]) -> Row:
    clock = Phases(size.device == "cuda")
    with patch.object(trainer, "Clock", lambda: clock), patch.object(trainer, "sample", sample):
        trainer.step_update(state)
    return {"phases": clock.found}


def planned(state: trainer.State, mode: str) -> Row:
    """The plan's peak of tensors in a step."""
    if state.plan is None:
        return {"planned_gib": None}
    peak = state.plan.with_changes(activation_offloading=mode).step_peak
    return {"planned_gib": round(peak / GIB, 2)}
