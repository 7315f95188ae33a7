"""The memory plan against what PyTorch allocates: every allocation and release in a profile.

Only what comes and goes is compared. What stays (weights, optimiser state) is compared by itself:
beside it the rest would hardly show.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from fastppo import toy
from fastppo.config import config_from_dict
from fastppo.memory.budgets import Budgets
from fastppo.memory.inputs import (
    CHUNK_BYTES_CPU,
    CHUNK_BYTES_GPU,
    CHUNK_ROWS_CPU,
    CHUNK_ROWS_TRAINED_CPU,
    MOST_TOKENS,
    MOST_WORDS,
    REUSED_FROM,
    REUSED_TO,
    WORD_BLOCK,
    WORD_COLUMNS,
    WORD_TILE,
    WORDS_CPU,
    WORDS_FROM,
    PlanInputs,
)
from fastppo.memory.plan import Plan, make_plan
from fastppo.memory.shapes import TABLE, ModelShape, from_config
from fastppo.memory.weights import Shapes
from fastppo.models.batch import Budget
from fastppo.ops import head, word_blocks, workspace
from fastppo.ops.backend import choose
from fastppo.ppo import trainer
from fastppo.ppo.advantage import estimate
from fastppo.ppo.score import score
from fastppo.ppo.update import update
from fastppo.run import console
from fastppo.types import Prompt, Rollout
from tests.memory.allocations import NEEDS_GROUPED_KEYS, profiled_allocations
from tests.memory.plans import plan_inputs
from tests.tiers import slow_unless

STAYS = ("weights", "adapter", "optimiser")


def come_and_go(plan: Plan, phase: str) -> int:
    """The highest peak of a phase, without what stays through the run."""
    return max(
        sum(count for row, count in m.rows.items() if not row.endswith(STAYS))
        for m in plan.peaks
        if m.phase == phase and not m.evaluation
    )


def resident_bytes(state: trainer.State) -> int:
    """Storages of the models, heads and the optimiser."""
    tensors = [*state.roles.model.parameters(), *state.roles.critic_head.parameters()]
    for group in state.optimizer.state.values():
        tensors += [value for value in group.values() if isinstance(value, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def rollout_of(prompts: list[int], response: int, vocab: int, template: Any) -> Rollout:
    """Rows with prompts of these lengths and responses of one, of random tokens."""
    generator = torch.Generator().manual_seed(0)
    width = max(prompts) + response
    ids_BT = torch.randint(10, vocab - 10, (len(prompts), width), generator=generator)
    for row, length in enumerate(prompts):
        ids_BT[row, length + response :] = template.pad_id
    return Rollout(
        prompts=[Prompt(ids_BT[row, :n].tolist(), "x") for row, n in enumerate(prompts)],
        input_ids_BT=ids_BT,
        prompt_lengths=prompts,
        response_lengths=[response] * len(prompts),
        terminated=[False] * len(prompts),
        sampler_logprob_N=torch.zeros(len(prompts) * response),
        texts=["x"] * len(prompts),
    )


def measure(
    state: trainer.State, rollout: Rollout, budgets: Budgets | None = None
) -> dict[str, int]:
    """Peaks of scoring and of an update whose optimiser has its state already."""
    scoring_budget = Budget() if budgets is None else budgets.scoring
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    workspace.release()
    rollout = state.roles.with_states(rollout)
    with profiled_allocations() as scoring:
        scored = score(
            state.roles, rollout, state.reward(rollout), temperature=1.0, budget=scoring_budget
        )
    experience = estimate(scored, state.config, state.controller, state.running_score)
    workspace.release()
    with profiled_allocations() as updating:
        update(state.roles, experience, state.config, state.optimizer, seed=0, budgets=budgets)
    return {"score": scoring.peak, "update": updating.peak}


def plan_for(state: trainer.State, shape: ModelShape, prompts: list[int], response: int) -> Plan:
    inputs = PlanInputs.of(state.config, shape, device="cpu").with_changes(
        cutoff_len=max(prompts),
        max_new_tokens=response,
        mixed_lengths=len(set(prompts)) > 1,
        compiled_ops=choose("test", None, torch.zeros(1)) == "native",
    )
    return make_plan(inputs, Shapes(shape))


@NEEDS_GROUPED_KEYS
@pytest.mark.parametrize(
    ("prompts", "changes"),
    slow_unless(
        lambda prompts, changes: changes in ({}, {"lora_layers": 2, "critic": "shared"}),
        [
            ([90, 61, 40, 83], {}),
            ([90] * 4, {"disable_gradient_checkpointing": False}),
            ([90] * 4, {"critic": "shared"}),
            ([90, 61, 40, 83], {"critic": "shared", "disable_gradient_checkpointing": False}),
            ([90, 61, 40, 83], {"lora_target": "q_proj,v_proj"}),
            ([90, 61, 40, 83], {"lora_layers": 2}),
            ([90] * 4, {"lora_layers": 1, "disable_gradient_checkpointing": False}),
            ([90, 61, 40, 83], {"lora_layers": 2, "critic": "shared"}),
            ([90, 61, 40, 83], {"fp16": True}),
            ([90, 61, 40, 83], {"fp16": True, "disable_gradient_checkpointing": False}),
        ],
    ),
    ids=[
        *("own", "own-recomputed", "shared", "shared-recomputed", "attention-only"),
        *("upper-half", "upper-layer-recomputed", "upper-half-shared"),
        *("fp16", "fp16-recomputed"),
    ],
)
def test_plan_of_a_tiny_llama_is_within_10_percent_of_what_is_allocated(
    prompts, changes, tmp_path, template
):
    toy.write_model(tmp_path / "model", hidden_size=48, layers=4)
    state = tiny_state(tmp_path, len(prompts), **changes)
    shape = from_config(state.roles.base.config.to_dict(), "the model's own")
    plan = plan_for(state, shape, prompts, 60)
    measured = measure(state, rollout_of(prompts, 60, shape.vocab, template))
    for phase, peak in measured.items():
        assert come_and_go(plan, phase) == pytest.approx(peak, rel=0.1), phase
    stays = sum(n for row, n in plan.columns["update"].rows.items() if row.endswith(STAYS))
    assert stays == pytest.approx(resident_bytes(state), rel=0.01)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_forwards_that_scoring_keeps_are_within_the_plan(tmp_path, template, checkpointing):
    """Of an actor and a separate critic: short sequences, in the room of one long micro-batch."""
    toy.write_model(tmp_path / "model", hidden_size=48, layers=4)
    state = tiny_state(tmp_path, 4, disable_gradient_checkpointing=not checkpointing)
    shape = from_config(state.roles.base.config.to_dict(), "the model's own")
    plan = plan_for(state, shape, [100] * 4, 60)
    rollout, room = rollout_of([20] * 4, 60, shape.vocab, template), 4 * (100 + 60)
    measure(state, rollout)  # what is made once
    with profiled_allocations() as found:
        scored = score(
            state.roles,
            rollout,
            state.reward(rollout),
            temperature=1.0,
            budget=Budget(),
            keep=room,
        )
        assert {role for role, _ in scored.kept.hidden} == {"actor", "critic"}
        experience = estimate(scored, state.config, state.controller, state.running_score)
        update(state.roles, experience, state.config, state.optimizer, seed=0)
    planned = max(come_and_go(plan, phase) for phase in ("score", "update"))
    assert found.peak <= planned


def tiny_state(folder: Path, rows: int, **changes: Any) -> trainer.State:
    """A run of one epoch: one optimiser step over all rows."""
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps([{"instruction": "x"}] * rows))
    settings: dict[str, Any] = {
        "stage": "ppo",
        "model_name_or_path": str(folder / "model"),
        "reward_model": "fastppo.toy:vowels",
        "reward_model_type": "function",
        "dataset": str(prompts),
        "template": "chatml",
        "output_dir": str(folder / "out"),
        "metrics_dir": str(folder / "metrics"),
        "per_device_train_batch_size": rows,
        "ppo_epochs": 1,
        "disable_gradient_checkpointing": True,
        **changes,
    }
    return trainer.init_state(config_from_dict(settings))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_plan_of_smollm2_is_within_10_percent_of_what_is_allocated(
    checkpointing, tmp_path, tokenizer, template, capsys
):
    """With a third of its layers, which are alike: its width and its vocabulary are what counts."""
    shape = replace(TABLE["HuggingFaceTB/SmolLM2-135M"], dtype="float32", layers=10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocab,
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                tie_word_embeddings=True,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
            )
        )
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    del model
    state = tiny_state(tmp_path, 2, lora_rank=16, disable_gradient_checkpointing=not checkpointing)
    prompts = [160, 130]
    plan = plan_for(state, shape, prompts, 64)
    measured = measure(state, rollout_of(prompts, 64, shape.vocab, template))
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with capsys.disabled():
        for phase, peak in measured.items():
            print(f"\n  {phase}: plan {come_and_go(plan, phase):,}, allocated {peak:,}", end="")
        print(f"\n  stays: {resident_bytes(state):,}; process at most {rss:,}")
    for phase, peak in measured.items():
        assert come_and_go(plan, phase) == pytest.approx(peak, rel=0.1), phase


def test_the_head_chunks_of_the_plan_are_those_of_the_operators():
    assert head._CHUNK_BYTES_CPU == CHUNK_BYTES_CPU
    assert head._CHUNK_ROWS_CPU == CHUNK_ROWS_CPU
    assert head._CHUNK_ROWS_TRAINED_CPU == CHUNK_ROWS_TRAINED_CPU
    assert head._CHUNK_BYTES_DEVICE == CHUNK_BYTES_GPU
    assert (workspace.SMALLEST, workspace.LARGEST) == (REUSED_FROM, REUSED_TO)
    shape = TABLE["Qwen/Qwen2.5-7B"]
    assert head._WORDS == WORDS_CPU
    assert word_blocks.LEAST_TOKENS == WORDS_FROM
    assert (word_blocks._BYTES, word_blocks._MOST_WORDS) == (WORD_BLOCK, MOST_WORDS)
    assert (word_blocks._MOST_TOKENS, word_blocks._TILE) == (MOST_TOKENS, WORD_TILE)
    assert word_blocks._COLUMNS == WORD_COLUMNS
    # Logits are float32, and their gradient has the 16 bits of the head.
    chunks = head.chunk_slices(4096, shape.vocab, torch.float32, torch.device("cuda"), None)
    rows = max(chunk.stop - chunk.start for chunk in chunks)
    inputs = plan_inputs(per_device_train_batch_size=4, bf16=True)
    (loss,) = [m for m in make_plan(inputs, Shapes(shape)).peaks if m.name == "the actor's loss"]
    assert loss.rows["head chunk"] == rows * shape.vocab * (4 + 2)


def test_the_peak_that_a_run_prints_counts_tensors_and_no_evaluation(config: Callable[..., Any]):
    shape = TABLE["Qwen/Qwen2.5-7B"]
    keys = {"bf16": True, "lora_rank": 64, "disable_gradient_checkpointing": False}
    own = config(**keys, per_device_eval_batch_size=64)
    less = config(**keys, per_device_eval_batch_size=1)
    plan, small = (
        make_plan(PlanInputs.of(c, shape, device="gpu"), Shapes(shape)) for c in (own, less)
    )
    assert plan.step_peak == small.step_peak
    assert plan.step_peak < plan.peak.total - plan.peak.rows["reserve"]


def test_after_the_first_step_the_plan_is_printed_beside_what_was_taken(
    state: Callable[..., trainer.State], monkeypatch, capsys
):
    plan, lengths = state().plan, {"cutoff_len": 30, "max_new_tokens": 8}
    here = plan.with_changes(**lengths).step_peak / 2**30
    limits = plan.inputs.config
    planned = (
        f"planned {here:.2f} of tensors for lengths as here (cutoff_len: 30, max_new_tokens: 8), "
        f"and {plan.step_peak / 2**30:.2f} for the longest that the keys allow (cutoff_len: "
        f"{limits.cutoff_len}, max_new_tokens: {limits.max_new_tokens}), which none has reached"
    )
    monkeypatch.setattr(console, "highest_rss", lambda: 3 * 2**29)
    console.memory_line(plan, torch.device("cpu"), **lengths)
    said = " ".join(capsys.readouterr().out.split())
    assert f"memory: 1.50 GiB at the highest, the whole process (resident); {planned}" in said
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 5 * 2**29)
    console.memory_line(plan, torch.device("cuda"), **lengths)
    said = " ".join(capsys.readouterr().out.split())
    assert f"memory: 2.50 GiB of tensors at the highest; {planned}" in said
    longest = {name: getattr(limits, name) for name in lengths}
    console.memory_line(plan, torch.device("cuda"), **longest)
    assert "none has reached" not in capsys.readouterr().out, "the keys' own lengths were reached"
    console.memory_line(None, torch.device("cuda"))
    assert "; not planned" in capsys.readouterr().out


@pytest.mark.alone
def test_the_highest_resident_size_is_in_bytes():
    rss = console.highest_rss()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 == pytest.approx(rss, rel=0.1)
