"""Out of memory: half of the phase's budget and once more, as if it had been so from the start."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastppo.config import Config
from fastppo.errors import TrainingStopped
from fastppo.memory.auto import advice_on_failure, suggest_changes
from fastppo.memory.budgets import Budget, Budgets
from fastppo.memory.retry import OutOfMemory, out_of_memory, retry
from fastppo.ppo import checkpoint, sampling, score, trainer, update
from fastppo.ppo.evaluation import evaluate
from fastppo.rm import train as reward_model
from fastppo.rm import trainer as pair_trainer
from fastppo.run.preflight import check
from tests.reward_server import serving
from tests.tiny import PROMPTS


def failing(function: Callable[..., Any], at: int, error: Exception) -> Callable[..., Any]:
    """The function, which fails at its `at`-th call, before that having done its work."""
    calls = [0]

    def run(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        result = function(*args, **kwargs)
        if calls[0] == at:
            torch.rand(7)  # what ran before the failure drew random numbers
            raise error
        return result

    return run


def full() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("phase", ["rollout", "score", "update"])
def test_where_processes_wait_for_each_other_nothing_is_tried_again(phase):
    """A second call would be one pass more than the others make: they would wait for ever."""
    budgets, calls = Budgets(Budget(64), Budget(64), 4, retries=False), []

    def fail() -> None:
        calls.append(phase)
        raise full()

    with pytest.raises(OutOfMemory, match=f"out of memory in {phase}, which no process can try"):
        retry(phase, budgets, used=lambda: 4)(fail)()
    assert calls == [phase]
    assert budgets == Budgets(Budget(64), Budget(64), 4, retries=False)


def test_which_errors_are_about_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert out_of_memory(MemoryError())
    assert out_of_memory(full())
    assert not out_of_memory(RuntimeError("shapes do not agree"))
    assert not out_of_memory(ValueError("out of memory"))


def budgets(update: int = 64, scoring: int = 64, rows: int = 4) -> Budgets:
    return Budgets(Budget(update), Budget(scoring), generation_batch=rows)


def test_what_was_used_is_halved_and_not_a_budget_that_was_larger():
    own = budgets()
    assert own.halve("rollout", 4) == "generation_batch: 2"
    assert own.halve("update", 30) == "ppo_max_token_len_per_gpu: 15"
    assert own.halve("score", 1000) == "log_prob_max_token_len_per_gpu: 32"
    assert own.halve("rollout", 1) is None
    assert own == budgets(15, 32, 1)


def never() -> None:
    raise full()


def test_a_second_failure_ends_it_and_another_error_is_let_through():
    with pytest.raises(OutOfMemory, match="in score, also with log_prob_max_token_len_per_gpu: 32"):
        retry("score", budgets(), used=lambda: 64)(never)()
    with pytest.raises(OutOfMemory, match="in rollout, which takes on one sequence at a time"):
        retry("rollout", budgets(), used=lambda: 1)(never)()
    calls: list[int] = []

    def wrong() -> None:
        calls.append(1)
        raise RuntimeError("shapes do not agree")

    with pytest.raises(RuntimeError, match="shapes"):
        retry("score", budgets(), used=lambda: 64)(wrong)()
    assert len(calls) == 1


def weights(state: trainer.State) -> list[torch.Tensor]:
    return [p.detach().clone() for g in state.optimizer.param_groups for p in g["params"]]


def steps(made: trainer.State) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
    """Weights and rows after two steps, without what a clock says."""
    for _ in range(2):
        trainer.step_update(made)
    rows = [
        {name: value for name, value in row.items() if "second" not in name}
        for row in made.metrics.rows
    ]
    return weights(made), rows


# The smallest budget that holds all four sequences is halved: two at a time.
@pytest.mark.parametrize(
    ("phase", "module", "name", "at"),
    [
        ("rollout", sampling.Draws, "draw", 1),
        pytest.param("score", score, "token_scores", 2, marks=pytest.mark.slow),
        ("update", update, "forward_backward", 1),
    ],
)
def test_a_retry_is_a_run_that_had_half_from_the_start(
    phase, module, name, at, state, monkeypatch, capsys
):
    """Weights, metrics and random numbers to the bit; in `update` an optimiser step failed midway,
    whose gradients were there already."""
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing(getattr(module, name), at, full()))
        made = state()
        got = steps(made)
    said = capsys.readouterr().err
    assert said.count("out of memory in") == 1
    assert f"out of memory in {phase}: tries once more, and goes on, with" in said
    other = state()
    assert other.budgets != made.budgets
    other.budgets.adopt(made.budgets.decisions())
    want = steps(other)
    assert all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True))
    assert got[1] == want[1]
    assert capsys.readouterr().err == ""


def drawn() -> list[float]:
    """A number of every generator that code in a run may draw from."""
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def test_the_second_try_draws_what_the_first_one_drew():
    seen: list[list[float]] = []

    def run() -> None:
        seen.append(drawn())
        if len(seen) == 1:
            raise full()

    retry("score", budgets(), used=lambda: 64)(run)()
    assert seen[0] == seen[1]


ASKED: list[list[str]] = []


def counting(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that keeps a state and draws, as a server that bills and has one would."""
    ASKED.append(list(completions))
    return [len(ASKED) + 0.01 * sum(drawn()) for _ in completions]


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_rewards_are_asked_once_where_scoring_runs_out_of_memory(at, state, monkeypatch):
    """The first step's scores are those of a run that never ran out of memory."""
    asked = {"reward_model": f"{__name__}:counting", "reward_model_type": "function"}
    scores = []
    for fails in (True, False):
        ASKED.clear()
        made = state(**asked)
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(score, "token_scores", failing(score.token_scores, at, full()))
            trainer.step_update(made)
        assert len(ASKED) == 1
        scores.append((made.metrics.rows[0]["score"], made.random["python"]))
        assert scores[0] == scores[-1]


@pytest.mark.slow  # as a function is asked, above
def test_a_server_is_billed_once_where_scoring_runs_out_of_memory(state, monkeypatch):
    with serving() as server:
        made = state(reward_model=server.url, reward_model_type="api")
        before = len(server.seen)
        monkeypatch.setattr(score, "token_scores", failing(score.token_scores, 2, full()))
        trainer.step_update(made)
        assert len(server.seen) - before == 1


def test_of_several_rewards_only_the_model_that_ran_out_is_asked_again(state, reward_dir, capsys):
    made = state(
        reward_model=f"{__name__}:counting,{reward_dir}",
        reward_model_type="function,lora",
        reward_weights=[1.0, 1.0],
    )
    part, forwards = made.reward.parts[1], list[int]()
    inner = part.hidden

    def hidden(batch: Any) -> torch.Tensor:
        forwards.append(len(batch.rows))
        if len(forwards) == 1:
            raise full()
        return inner(batch)

    part.hidden = hidden
    ASKED.clear()
    trainer.step_update(made)
    assert len(ASKED) == 1
    assert forwards[0] == 4
    assert sum(forwards[1:]) == 4
    assert len(forwards) > 2  # half as large
    assert capsys.readouterr().err.count("out of memory in score") == 1


def test_an_evaluation_whose_reward_model_runs_out_tries_again_too(state, reward_dir, capsys):
    """The reference is scored by the rewards alone."""
    made = state(reward_model=str(reward_dir), reward_model_type="lora")
    part = made.reward.parts[0]
    part.hidden = failing(part.hidden, 1, full())
    evaluate(made)
    assert capsys.readouterr().err.count("out of memory in score") == 1


def test_a_later_optimiser_step_is_begun_anew_and_differs_by_rounding(state, monkeypatch):
    made, plain = state(), state()
    monkeypatch.setattr(update, "forward_backward", failing(update.forward_backward, 2, full()))
    got = steps(made)[0]
    monkeypatch.undo()
    want = steps(plain)[0]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(got, want, strict=True))


def test_a_second_failure_is_one_line_with_what_helps_and_code_1(state, monkeypatch):
    made = state()
    monkeypatch.setattr(update, "forward_backward", lambda *_, **__: never())
    with (
        pytest.raises(TrainingStopped) as stopped,
        advice_on_failure(made.plan, made.config, made.budgets, made.roles.device),
    ):
        trainer.step_update(made)
    said = str(stopped.value)
    assert said.startswith("out of memory in update, also with ppo_max_token_len_per_gpu: ")
    assert "; the smallest changes that help: " in said
    assert "\n" not in said
    assert all(p.grad is None for g in made.optimizer.param_groups for p in g["params"])


def test_a_load_that_fails_says_what_helps(config, monkeypatch):
    monkeypatch.setattr("fastppo.ppo.state.build", lambda *_: never())
    with pytest.raises(TrainingStopped, match="out of memory; the smallest changes that help"):
        trainer.init_state(config())


def test_advice_without_a_plan(state):
    made = state()
    said = suggest_changes(None, made.config, made.budgets, 1)
    assert said == "lower per_device_train_batch_size, lora_rank or max_new_tokens"


def test_stage_rm_begins_anew_in_half_as_large_micro_batches(
    model_dir, tmp_path, monkeypatch, capsys
):
    """As if the file had said so: the same optimiser steps, twice as many passes to each."""
    pairs = [{"instruction": text, "chosen": "aye", "rejected": "no"} for text in PROMPTS]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))

    def train(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        settings = {
            "stage": "rm",
            "model_name_or_path": str(model_dir),
            "dataset": str(tmp_path / "pairs.json"),
            "template": "chatml",
            "output_dir": str(tmp_path / name),
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "learning_rate": 1e-2,
            **changes,
        }
        made = Config(**settings)
        reward_model.run(made, check(made))
        return load_file(tmp_path / name / "adapter_model.safetensors")

    with monkeypatch.context() as patch:
        loss = failing(pair_trainer.pair_loss, 2, full())  # the second optimiser step
        patch.setattr(pair_trainer, "pair_loss", loss)
        got = train("retried")
    said = capsys.readouterr().err
    assert "out of memory in update: tries once more, and goes on, with" in said
    want = train("half", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in got)


def test_a_run_that_goes_on_decides_as_the_checkpoint_did(state, tmp_path):
    """Whatever the file, or the memory there, would have it decide now."""
    made = trainer.step_update(state())
    half = {"ppo_max_token_len_per_gpu": 77, "log_prob_max_token_len_per_gpu": 99}
    others = {"generation_batch": 3, "chunk_bytes": 1 << 20, "activation_offloading": "checkpoint"}
    made.budgets.adopt({**half, **others})
    checkpoint.save_to_resume(made, tmp_path)
    resumed = state(generation_batch="auto")
    assert resumed.budgets.generation_batch == 4
    assert resumed.roles.base.activation_offload.mode == "none"
    checkpoint.resume(resumed, tmp_path / "checkpoint-1")
    assert resumed.budgets == made.budgets
    assert resumed.roles.base.activation_offload.mode == "checkpoint"
    assert resumed.budgets.decisions() == {**half, **others}
