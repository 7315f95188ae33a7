"""The best policy by a metric of the evaluations, and the stop after some without a better one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fastppo.ppo import best, trainer
from fastppo.run.durable import checkpoints
from fastppo.run.preflight import check


def entries(*values: float, name: str = "eval_reward") -> list[dict[str, float]]:
    """Evaluations with these values after steps 0, 1, 2, ..."""
    return [{"step": step, name: value} for step, value in enumerate(values)]


def test_the_best_is_the_greatest_after_a_step_and_of_two_alike_the_first(config):
    settings = config()
    assert best.best(entries(9.0, 0.1, 0.5, 0.5, 0.2), settings)["step"] == 2
    assert best.best(entries(9.0), settings) is None  # the reference itself
    lower = config(greater_is_better=False)
    assert best.best(entries(0.0, 0.1, 0.5, 0.1), lower)["step"] == 1


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "eval_reward"),
        ({"eval_judge": "fastppo.toy:vowels"}, "eval_judge"),
        ({"metric_for_best_model": "win_rate"}, "eval_win_rate"),
        ({"metric_for_best_model": "eval_win_rate"}, "eval_win_rate"),
    ],
)
def test_what_evaluations_are_compared_by(config, changes, name):
    found = best.best(entries(0.0, 1.0, 3.0, 2.0, name=name), config(**changes))
    assert found["step"] == 2


LIKED: list[float] = []


def judge(prompts, completions, **_):
    """Scores of a list that each test fills: one for each call, the reference first."""
    return [LIKED.pop(0)] * len(completions)


@pytest.fixture
def run(config, tmp_path):
    """A function that runs stage ppo and evaluates at every step; returns its output_dir."""

    def make(*liked: float, **changes) -> Path:
        LIKED[:] = liked
        settings = config(
            eval_judge=f"{__name__}:judge",
            eval_strategy="steps",
            eval_steps=1,
            eval_max_samples=2,
            save_steps=10,
            **changes,
        )
        trainer.run(settings, check(settings))
        return tmp_path / "out"

    return make


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def steps_of(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "metrics" / "training_metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_the_best_policy_is_left_in_output_dir_with_its_evaluation(run, tmp_path):
    # The reference, three steps of which the second is liked best, then that one again.
    out = run(0.0, 1.0, 3.0, 2.0, 3.0, max_steps=3, load_best_model_at_end=True)
    assert weights(out) == weights(out / "checkpoint-2") != weights(out / "checkpoint-3")
    found = json.loads((out / "eval_results.json").read_text())
    assert (found["eval_judge"], found["eval_best_step"]) == (3.0, 2)
    state = json.loads((out / "trainer_state.json").read_text())
    assert (state["best_metric"], state["best_global_step"], state["global_step"]) == (3.0, 2, 3)
    judged = [e["eval_judge"] for e in state["log_history"] if "eval_judge" in e]
    assert judged == [1.0, 3.0, 2.0]
    again = next(e for e in state["log_history"] if e["step"] == 2 and "eval_reward" in e)
    for name in ("eval_reward", "eval_kl", "eval_length", "eval_win_rate"):
        assert found[name] == again[name], "the same policy on the same prompts and numbers"
    assert "after 2 PPO steps" in (out / "eval_samples.md").read_text()


@pytest.mark.slow
def test_the_best_checkpoint_outlives_save_total_limit(run):
    liked = (0.0, 1.0, 3.0, 2.0, 2.5, 3.0)
    out = run(*liked, max_steps=4, load_best_model_at_end=True, save_total_limit=1)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.slow
def test_a_resumed_run_stops_and_chooses_as_the_uninterrupted_one(run, tmp_path):
    """It was killed after step 3, whose checkpoint is the newest; the best is step 2."""
    keys = {"max_steps": 9, "load_best_model_at_end": True, "early_stopping_steps": 2}
    out = run(0.0, 1.0, 3.0, 2.0, 2.0, 2.0, 3.0, **keys)
    whole, kept, state = steps_of(tmp_path), weights(out), (out / "trainer_state.json").read_text()
    assert len(whole) == 4, "two evaluations after the best one"
    run(2.0, 2.0, 2.0, 3.0, **keys, resume_from_checkpoint=str(out / "checkpoint-2"))
    assert steps_of(tmp_path) == whole
    assert weights(out) == kept == weights(out / "checkpoint-2")
    after = (out / "trainer_state.json").read_text()
    judged = [
        [e["eval_judge"] for e in json.loads(text)["log_history"] if "eval_judge" in e]
        for text in (state, after)
    ]
    assert judged[0] == judged[1] == [1.0, 3.0, 2.0, 2.0]


def test_early_stopping_ends_the_run_after_so_many_evaluations_without_a_better_one(config, state):
    made = state(eval_strategy="steps", early_stopping_steps=2)
    for values, stops in (
        ((0.0, 1.0, 0.9), False),
        ((0.0, 1.0, 0.9, 1.0), True),
        ((0.0, 1.0, 0.9, 1.1, 1.0), False),
    ):
        made.evaluations = entries(*values)
        assert best.stops_early(made) is stops
