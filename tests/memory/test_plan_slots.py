"""The KV cache of the plan is the one that the sampler allocates."""

from __future__ import annotations

from typing import Any

import pytest

from fastppo.memory.budgets import Budgets
from fastppo.memory.inputs import FEW_ROWS
from fastppo.memory.plan import make_plan
from fastppo.memory.units import GIB, SLACK
from fastppo.ops import few_rows
from fastppo.ppo import rollout, sampler
from fastppo.ppo.sampling import Sampling
from fastppo.ppo.slots import SlotCache
from fastppo.types import Prompt

PROMPT, NEW = 6, 3


def test_the_most_rows_are_those_of_the_layers_for_few_rows():
    assert few_rows.MOST_ROWS == FEW_ROWS


@pytest.fixture
def caches(monkeypatch) -> list[SlotCache]:
    """The caches that sampling has allocated."""
    found: list[SlotCache] = []

    class Noted(SlotCache):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            found.append(self)

    monkeypatch.setattr(sampler, "SlotCache", Noted)
    return found


@pytest.mark.parametrize(
    ("rows", "native", "most", "room", "slots"),
    [
        (8, True, None, None, 8),
        (FEW_ROWS + 8, True, None, None, FEW_ROWS),
        (FEW_ROWS + 8, True, FEW_ROWS + 4, None, FEW_ROWS),
        (FEW_ROWS + 8, True, 5, None, 5),
        (FEW_ROWS + 8, False, None, None, FEW_ROWS + 8),
        (FEW_ROWS + 8, True, None, 3.5 * (PROMPT + NEW + SLACK), 3),
        (8, True, None, 8.0 * (PROMPT + NEW), 8),  # none enters later: no slack
        (9, True, 8, 8.0 * (PROMPT + NEW), 1),  # the ninth does, and slots are wider
    ],
)
def test_the_plan_counts_the_slots_that_are_allocated(
    state, caches, monkeypatch, rows, native, most, room, slots
):
    run = state()
    token = rollout.cache_bytes(run.roles)
    inputs = run.plan.inputs.with_changes(
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        cutoff_len=PROMPT,
        max_new_tokens=NEW,
        generation_batch=most,
        rollout_kv_cache_gib=None if room is None else room * token / GIB,
        compiled_ops=native,
    )
    assert inputs.scored_rows == rows
    if native:
        assert rollout.runs_native(run.roles.base.get_output_embeddings().weight)
    else:  # as on a machine without the native kernels
        monkeypatch.setattr(rollout, "runs_native", lambda _: False)
    rollout.sample(
        run.roles,
        [Prompt([10 + i] * PROMPT, "x") for i in range(rows)],
        sampling=Sampling.of(inputs.config),
        template=run.template,
        tokenizer=run.tokenizer,
        seed=0,
        budgets=Budgets.of(inputs.config),
    )
    (cache,) = caches
    assert len(cache.slot_layers[0].keys) == slots
    allocated = sum(x.nbytes for each in cache.slot_layers for x in (each.keys, each.values))
    plan = make_plan(inputs, run.plan.shapes)
    (planned,) = [
        peak.rows["KV cache"]
        for peak in plan.peaks
        if not peak.evaluation and f"the last token of {slots} sequences" in peak.name
    ]
    assert planned == allocated


def test_a_run_without_native_kernels_plans_for_all_its_rows(state, monkeypatch):
    rows = FEW_ROWS + 8
    assert state().plan.with_changes(per_device_train_batch_size=rows).inputs.rollout_rows < rows
    monkeypatch.setattr("fastppo.memory.auto.choose", lambda *_: "torch")
    assert state().plan.with_changes(per_device_train_batch_size=rows).inputs.rollout_rows == rows
