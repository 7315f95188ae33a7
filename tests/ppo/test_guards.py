"""Each guard provoked by what it is there for, and silent while a run is healthy."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from math import isinf
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fastppo import toy
from fastppo.errors import TrainingStopped
from fastppo.ppo import checkpoint, guards, trainer
from fastppo.ppo.columns import COLUMNS
from fastppo.ppo.state import init_state
from fastppo.ppo.update import check_first_pass
from tests.tiers import slow_unless

HEALTHY = {
    "ratio_first_pass": 0.0,
    "kl": 3.0,
    "entropy": 2.0,
    "eos_share": 0.8,
    "response_tokens": 80.0,
    "response_length": 10.0,
    "score_length_corr": 0.2,
    "sampler_gap_abs": 1e-6,
    "nonfinite_steps": 0.0,
    "overflow_steps": 0.0,
    "loss_scale": 65536.0,
    "value_clipfrac": 0.05,
    "rollout_is_ess": 0.99,
    "rollout_is_masked": 0.0,
}


def fired(rows: list[dict[str, float]]) -> set[str]:
    return {name for name, value in rows[-1].items() if name.startswith("guard_") and value}


def flagged(changes: list[dict[str, float]], settings: Any) -> list[dict[str, float]]:
    """Rows like a healthy run's with some columns changed, and the guards' columns of each."""
    rows: list[dict[str, float]] = []
    for change in changes:
        row = {**HEALTHY, **change}
        rows.append({**row, **guards.flags(rows, row, settings, "float32")})
    return rows


def test_every_guard_has_its_column_and_says_what_to_try():
    assert set(guards.GUARDS) == {name for name in COLUMNS if name.startswith("guard_")}
    for name, guard in guards.GUARDS.items():
        line = guard.line(name, HEALTHY)
        assert line.startswith(f"{name}: ")
        assert "; " in line
        assert "{" not in line


@pytest.mark.slow
def test_a_healthy_run_gets_no_warning(tmp_path):
    """The toy over 10 steps, the longest window: it learns, and no guard fires at any of them."""
    run = init_state(toy.config(tmp_path, metrics_dir=str(tmp_path / "metrics")))
    for _ in range(10):
        run = trainer.step_update(run)
        assert guards.warnings(run.metrics.rows) == []
        assert fired(run.metrics.rows) == set()
    rows = run.metrics.rows
    assert rows[-1]["score"] > rows[0]["score"], "it should have learned"


def test_a_warning_is_said_once_and_its_column_stays(config):
    rows = flagged([{}, {"kl": 99.0}, {"kl": 99.0}], config())
    assert guards.warnings(rows[:1]) == []
    (line,) = guards.warnings(rows[:2])
    assert line.startswith("guard_kl: KL is 99.0 nats a response")
    assert guards.warnings(rows) == []
    assert [row["guard_kl"] for row in rows] == [0.0, 1.0, 1.0]


def test_eos_that_falls_to_0(config):
    def share(*shares: float) -> list[dict[str, float]]:
        return flagged([{"eos_share": x} for x in shares], config())

    assert fired(share(*[0.8] * 5, *[0.0] * 4)) == {"guard_eos"}
    # 8 responses a step: 20 EOS expected need 4 steps at 0.8, and 20 at 0.125.
    assert fired(share(*[0.8] * 5, *[0.0] * 3)) == set()
    assert fired(share(*[0.125] * 5, *[0.0] * 19)) == set()
    assert fired(share(*[0.125] * 5, *[0.0] * 20)) == {"guard_eos"}
    assert fired(share(*[0.05] * 5, *[0.0] * 60)) == set(), "there never were any"


def test_score_and_length_that_move_together(config):
    def correlations(*values: float, responses: float = 8) -> set[str]:
        tokens = responses * 10.0
        changes = [{"score_length_corr": x, "response_tokens": tokens} for x in values]
        return fired(flagged(changes, config()))

    assert correlations(*[0.9] * 10) == {"guard_length"}
    assert correlations(*[-0.9] * 10) == {"guard_length"}
    assert correlations(*[0.9] * 9) == set()
    assert correlations(*[0.9, -0.9] * 10) == set(), "chance has both signs"
    # Two responses always correlate by 1 or -1: 40 steps of them are needed.
    assert correlations(*[1.0] * 39, responses=2) == set()
    assert correlations(*[1.0] * 40, responses=2) == {"guard_length"}


def test_a_critic_that_the_value_clip_holds_back(config):
    def shares(*values: float) -> set[str]:
        return fired(flagged([{"value_clipfrac": x} for x in values], config()))

    assert shares(0.5, 0.5, 0.5) == {"guard_value_clip"}
    assert shares(0.5, 0.5) == set(), "two steps are no habit yet"
    assert shares(0.9, 0.9, 0.9, 0.05, 0.05, 0.05) == set()


def constant_scores(state: Any, monkeypatch: pytest.MonkeyPatch, clip: float | None) -> Any:
    """Four steps of responses that all score 5; the critic's head starts at 0, the actor stays."""
    run = state(
        critic="shared",
        learning_rate=0.0,
        critic_learning_rate=0.02,
        cliprange_value=clip,
        lr_scheduler_type="constant",
        lam=1.0,  # so that the return of every token is 5 from the first step on
        ppo_epochs=16,
        max_steps=20,
    )
    monkeypatch.setattr(
        type(run.reward),
        "__call__",
        lambda _, rollout: (torch.full((len(rollout.prompts),), 5.0), {}),
    )
    said = []
    for _ in range(4):
        trainer.step_update(run)
        said += guards.warnings(run.metrics.rows)
    return run.metrics.rows, [line for line in said if line.startswith("guard_value_clip")]


@pytest.mark.slow
def test_a_value_clip_far_below_the_scores_holds_the_critic_and_null_lets_it_go(state, monkeypatch):
    free, silent = constant_scores(state, monkeypatch, None)
    held, said = constant_scores(state, monkeypatch, 0.2)
    gaps = [5.0 - rows[-1]["value_mean"] for rows in (free, held)]
    assert abs(gaps[0]) < 1.5, "three updates, and most of the way"
    assert gaps[1] > 2 * abs(gaps[0])
    assert all(row["value_clipfrac"] == row["guard_value_clip"] == 0.0 for row in free)
    assert silent == []
    (line,) = said
    assert "set cliprange_value: null" in line


def test_kl_past_its_limit(state):
    run = trainer.step_update(state(ppo_target=1e-6))
    assert fired(run.metrics.rows) == set(), "the policy has not moved yet"
    assert fired(trainer.step_update(run).metrics.rows) == {"guard_kl"}


def test_entropy_that_collapses(state):
    run = trainer.step_update(state(max_steps=9))
    with torch.no_grad():
        run.roles.base.lm_head.weight.mul_(100.0)
    assert fired(trainer.step_update(run).metrics.rows) == {"guard_entropy"}


def test_a_ratio_that_is_off_on_the_first_pass(state, monkeypatch):
    def shifted(*args: Any, **kwargs: Any) -> Any:
        scored = inner(*args, **kwargs)
        return replace(scored, logprob_N=scored.logprob_N + 5e-5)

    inner = trainer.score
    monkeypatch.setattr(trainer, "score", shifted)
    assert fired(trainer.step_update(state()).metrics.rows) == {"guard_ratio"}
    # Ten times the limit of the warning stops the run, see check_first_pass.
    with pytest.raises(TrainingStopped, match="before the first update"):
        check_first_pass(2e-4, "float32")


@pytest.mark.parametrize(("changes", "fires"), [({}, True), ({"top_k": 5}, False)])
def test_a_sampler_that_is_another_policy(state, monkeypatch, changes, fires):
    def shifted(*args: Any, **kwargs: Any) -> Any:
        rollout = inner(*args, **kwargs)
        sign_N = torch.arange(len(rollout.sampler_logprob_N)) % 2 * 2.0 - 1.0
        return replace(rollout, sampler_logprob_N=rollout.sampler_logprob_N + 0.01 * sign_N)

    inner = trainer.sample
    monkeypatch.setattr(trainer, "sample", shifted)
    row = trainer.step_update(state(**changes)).metrics.rows[0]
    assert row["sampler_gap_abs"] >= 0.005
    assert row["guard_sampler"] == float(fires)


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float) -> None:
    """The first advantage of these PPO steps is `value`."""
    estimate, number = trainer.estimate, [0]

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        experience = estimate(*args, **kwargs)
        number[0] += 1
        if number[0] in steps:
            experience.advantage_N[0] = value
        return experience

    monkeypatch.setattr(trainer, "estimate", spoiled)


def learned(run: Any) -> list[torch.Tensor]:
    """Weights and Adam's moments, a copy."""
    moments = [x for one in run.optimizer.state.values() for x in one.values()]
    return [x.detach().clone() for x in [*checkpoint.trainable_parameters(run), *moments]]


@pytest.mark.parametrize(
    ("optim", "value"),
    slow_unless(
        lambda optim, value: optim == "adamw_torch" and isinf(value),
        product(["adamw_torch_fused", "adamw_torch"], [float("nan"), float("inf")]),
    ),
)
def test_a_loss_that_is_not_finite_skips_its_steps_and_nothing_else(
    state, monkeypatch, value, optim
):
    poisoned(monkeypatch, {2}, value)
    run = trainer.step_update(state(max_steps=9, optim=optim))
    before = learned(run)
    row = trainer.step_update(run).metrics.rows[-1]
    assert (row["optimizer_steps"], row["nonfinite_steps"], row["nonfinite_run"]) == (0, 2, 2)
    assert fired(run.metrics.rows) == {"guard_nonfinite"}
    assert all(torch.equal(a, b) for a, b in zip(before, learned(run), strict=True))
    row = trainer.step_update(run).metrics.rows[-1]
    assert (row["optimizer_steps"], row["nonfinite_steps"], row["nonfinite_run"]) == (2, 0, 0)
    assert all(x.isfinite().all() for x in learned(run))


def test_max_bad_steps_in_a_row_stop_the_run_and_keep_the_batch(state, monkeypatch, tmp_path):
    # Two optimiser steps in each PPO step: the third in a row is the first of step 3.
    poisoned(monkeypatch, {2, 3}, float("nan"))
    run = trainer.step_update(trainer.step_update(state(max_steps=9)))
    before = learned(run)
    words = r"3 optimiser steps in a row .*bad_batch_step_3\.safetensors"
    with pytest.raises(TrainingStopped, match=words):
        trainer.step_update(run)
    assert all(torch.equal(a, b) for a, b in zip(before, learned(run), strict=True))
    with safe_open(tmp_path / "out" / "bad_batch_step_3.safetensors", "pt") as batch:
        assert batch.get_tensor("advantage_N")[0].isnan()
        ids = batch.get_tensor("input_ids_BT")
        assert len(ids) == len(batch.get_tensor("score_B")) == 4
        assert len(json.loads(batch.metadata()["texts"])) == 4
        assert "value_N" in set(batch.keys())


def test_bad_steps_apart_do_not_stop_it_nor_any_number_with_0(state, monkeypatch):
    poisoned(monkeypatch, {1, 3}, float("nan"))
    run = state(max_steps=9)
    for _ in range(3):
        run = trainer.step_update(run)
    assert [row["nonfinite_run"] for row in run.metrics.rows] == [2, 0, 2]
    poisoned(monkeypatch, {1, 2, 3}, float("nan"))
    run = state(max_steps=9, max_bad_steps=0)
    for _ in range(3):
        run = trainer.step_update(run)
    assert run.metrics.rows[-1]["nonfinite_run"] == 6


def test_a_resumed_run_counts_on(state, monkeypatch, tmp_path):
    poisoned(monkeypatch, {1, 2}, float("nan"))
    folder = checkpoint.save_to_resume(trainer.step_update(state(max_steps=9)), tmp_path)
    run = state(max_steps=9)
    checkpoint.resume(run, folder)
    with pytest.raises(TrainingStopped, match="3 optimiser steps in a row"):
        trainer.step_update(run)
