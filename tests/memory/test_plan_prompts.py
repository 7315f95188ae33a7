"""The plan of prompts that are run once for their responses, against what a step allocates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastppo import toy
from fastppo.memory.plan import make_plan
from fastppo.memory.shapes import TABLE, from_config
from fastppo.memory.weights import Shapes
from fastppo.types import Prompt
from tests.memory.plans import plan_inputs
from tests.memory.test_plan_measured import (
    STAYS,
    come_and_go,
    measure,
    plan_for,
    rollout_of,
    tiny_state,
)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_pass_with_prompts_once_allocates_what_its_peaks_say(checkpointing, tmp_path, template):
    """Four responses of 30 tokens to a prompt of 90: 210 tokens in place of 480."""
    toy.write_model(tmp_path / "model", hidden_size=48, layers=4)
    changes = {"num_generations": 4, "advantage": "grpo", "critic": "shared"}
    state = tiny_state(tmp_path, 4, disable_gradient_checkpointing=not checkpointing, **changes)
    assert state.budgets.update.prompts is not None
    shape = from_config(state.roles.base.config.to_dict(), "the model's own")
    plan = plan_for(state, shape, [90] * 4, 30)
    rollout = rollout_of([90] * 4, 30, shape.vocab, template)
    rollout.input_ids_BT[:, :90] = rollout.input_ids_BT[0, :90]
    same = [Prompt(rollout.input_ids_BT[0, :90].tolist(), "x")] * 4
    rollout = replace(rollout, prompts=same)
    measured = measure(state, rollout, budgets=state.budgets)
    apart = measure(state, rollout)
    for phase, peak in measured.items():
        planned = max(
            sum(n for row, n in each.rows.items() if not row.endswith(STAYS))
            for each in plan.peaks
            if each.phase == phase and not each.evaluation and "prompts once" in each.name
        )
        # The head's part of a phase is the same either way, and may be its peak.
        if phase == "update":
            assert peak < 0.9 * apart[phase]
            assert planned == pytest.approx(peak, rel=0.15), phase
        assert come_and_go(plan, phase) >= 0.9 * peak


@pytest.mark.parametrize(
    ("changes", "there"),
    [
        ({}, True),
        ({"num_generations": 1}, False),
        ({"padding_free": True}, False),
        ({"quantization_bit": 8}, False),
        ({"flash_attn": "disabled"}, False),
        ({"max_new_tokens": 4096, "cutoff_len": 64}, False),  # the mask would cost more
    ],
    ids=str,
)
def test_the_plan_has_peaks_of_their_own_where_prompts_are_run_once(changes, there):
    keys = {
        "num_generations": 8,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "cutoff_len": 512,
        "max_new_tokens": 64,
        **changes,
    }
    plan = make_plan(plan_inputs(**keys), Shapes(TABLE["HuggingFaceTB/SmolLM2-135M"]))
    names = [peak.name for peak in plan.peaks]
    once = [name for name in names if "prompts once" in name]
    assert bool(once) == there
    if there:
        assert "the actor's backward, prompts once" in once
        assert f"the actor's pass over 1 x {512 + 8 * 64} tokens, prompts once" in once
