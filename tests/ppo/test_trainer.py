"""The loop: step 0, seeds, resume, schedules, files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from fastppo.ops.backend import choose
from fastppo.ppo import checkpoint, lines, trainer
from fastppo.ppo.columns import COLUMNS, REWARD_COLUMN, REWARD_MEANING, absent_columns
from fastppo.ppo.evaluation import evaluate
from fastppo.ppo.lines import notices
from fastppo.ppo.state import total_steps
from fastppo.run.preflight import check

CLOCKS = {name for name, words in COLUMNS.items() if words.endswith("(a clock)")}
ROOT = Path(__file__).parents[2]


def without_clocks(rows):
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]


def test_kl_is_0_before_anything_was_learned(state):
    first = trainer.step_update(state())
    row = first.metrics.rows[0]
    assert row["kl"] == 0.0
    assert row["ratio_first_pass"] == 0.0
    assert row["sampler_gap"] == pytest.approx(0.0, abs=1e-5)
    second = trainer.step_update(first)
    assert second.metrics.rows[1]["kl"] != 0.0


def test_36_a_seeded_run_twice_is_identical(state, tmp_path):
    runs = []
    for name in ("a", "b"):
        run = state(seed=7, metrics_dir=str(tmp_path / name))
        for _ in range(2):
            run = trainer.step_update(run)
        runs.append(run)
    assert without_clocks(runs[0].metrics.rows) == without_clocks(runs[1].metrics.rows)
    pairs = zip(
        checkpoint.trainable_parameters(runs[0]),
        checkpoint.trainable_parameters(runs[1]),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    other = trainer.step_update(state(seed=8, metrics_dir=str(tmp_path / "c")))
    assert without_clocks(other.metrics.rows)[0] != without_clocks(runs[0].metrics.rows)[0]


@pytest.mark.parametrize("critic", ["adapter", pytest.param("shared", marks=pytest.mark.slow)])
def test_19_a_resumed_run_is_the_unbroken_one_bit_for_bit(state, tmp_path, critic):
    changes = {"critic": critic, "ppo_score_norm": True, "horizon": 50, "max_steps": 4}
    changes["lr_scheduler_type"] = "cosine"
    straight = state(metrics_dir=str(tmp_path / "straight"), **changes)
    for step in range(4):
        straight = trainer.step_update(straight)
        if step == 1:
            checkpoint.save_to_resume(straight, tmp_path)
    resumed = state(metrics_dir=str(tmp_path / "resumed"), **changes)
    assert checkpoint.resume(resumed, tmp_path / "checkpoint-2") == []
    assert resumed.step == 2
    for _ in range(2):
        resumed = trainer.step_update(resumed)
    assert without_clocks(resumed.metrics.rows) == without_clocks(straight.metrics.rows)
    assert resumed.controller == straight.controller
    assert resumed.running_score == straight.running_score
    pairs = zip(
        checkpoint.trainable_parameters(resumed),
        checkpoint.trainable_parameters(straight),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_36_every_prompt_is_seen_once_an_epoch_and_none_is_dropped(state):
    run = state(per_device_train_batch_size=3)  # 4 prompts: TRL's drop_last would lose one
    seen = []
    for step in range(4):
        run.step = step
        seen += [prompt.text for prompt in trainer.next_prompts(run)]
    epochs = [seen[start : start + 4] for start in range(0, 12, 4)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_data_set_smaller_than_the_batch_still_trains(state):
    run = state(per_device_train_batch_size=6)
    assert total_steps(run.config.model_copy(update={"max_steps": -1}), 4) == 2
    assert len(trainer.next_prompts(run)) == 6


def test_prompts_that_are_left_over_have_a_step_of_their_own(config):
    once = config(max_steps=-1, num_train_epochs=1.0)
    assert [total_steps(once, prompts) for prompts in (3, 4, 5, 6, 8, 9)] == [*[1, 1, 2, 2, 2, 3]]
    tenth = config(max_steps=-1, num_train_epochs=0.1, per_device_train_batch_size=3)
    assert total_steps(tenth, 30) == 1, "0.1 * 30 / 3 is above 1 by rounding alone"


def test_settings_without_effect_are_noted_before_the_run(config):
    def said(**changes):
        return [line for line in notices(config(**changes), 1000) if "effect" in line]

    (line,) = said(vf_coef=0.5, critic="adapter")
    assert line.startswith("vf_coef: next to no effect with critic: adapter")
    assert "critic_learning_rate" in line
    assert said(vf_coef=0.5, critic="shared") == said(critic="adapter") == []
    assert said(vf_coef=0.5, critic="adapter", optim="sgd") == []
    (line,) = said(horizon=50, init_kl_coef=0.0)
    assert line.startswith("horizon: no effect with init_kl_coef: 0")
    (line,) = said(warmup_steps=5, lr_scheduler_type="constant")
    assert line.endswith("use constant_with_warmup")
    late = notices(config(critic_warmup=10, critic="shared"), 10)
    assert any(line.startswith("critic_warmup: 10 leaves none of the 10 steps") for line in late)


def test_warm_up_does_not_waste_the_first_rollout(state):
    run = state(warmup_steps=2, learning_rate=1e-3, max_steps=10)
    row = trainer.step_update(run).metrics.rows[0]
    assert row["learning_rate"] == pytest.approx(5e-4)


def test_a_run_too_short_for_the_kl_controller_says_so(config):
    short = notices(config(horizon=10000), 10)
    assert any("too short for the KL controller" in line for line in short)
    assert not any("KL controller" in line for line in notices(config(horizon=20), 10))


def test_a_horizon_shorter_than_a_step_is_named_and_any_number_of_steps_is_counted(config):
    (line,) = [line for line in notices(config(horizon=3), 10**6) if line.startswith("horizon")]
    assert line == (
        "horizon: 3 is shorter than a step of 4 responses, and acts as 4: beta moves by at most "
        "20% a step"
    )
    assert not any(line.startswith("horizon") for line in notices(config(horizon=4), 10**6))
    fixed = config(horizon=3, adap_kl_ctrl=False)
    assert not any("shorter" in line for line in notices(fixed, 10**6))


def test_truncated_sampling_is_announced(config):
    assert any(
        line.startswith("top_p, top_k:") for line in notices(config(top_p=0.9, top_k=20), 1000)
    )


@pytest.mark.pictures
def test_evaluation_writes_the_files_and_compares_on_the_same_prompts(state, tmp_path):
    run = trainer.step_update(state(val_size=0.25, eval_judge="fastppo.toy:vowels"))
    summary = evaluate(run)
    folder = tmp_path / "metrics"
    assert json.loads((folder / "summary.json").read_text()) == summary
    for key in ("steps", "seconds", "reward_before", "reward_after", "kl", "judge_before"):
        assert isinstance(summary[key], (int, float)), key
    assert all(not isinstance(value, (dict, list)) for value in summary.values())
    # The judge is the reward here, so the two must agree.
    assert summary["judge_after"] == pytest.approx(summary["reward_after"])
    with (folder / "training_metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == [name for name in COLUMNS if name not in absent_columns(run.config)]
    (sample,) = json.loads((folder / "samples.json").read_text())
    assert {"prompt", "before", "after", "reward_before", "judge_after"} <= sample.keys()
    assert (folder / "training_curves.png").read_bytes()[:4] == b"\x89PNG"


def test_before_any_step_before_and_after_are_the_same_texts(state):
    summary = evaluate(state())
    assert summary["kl"] == 0.0
    assert summary["reward_before"] == summary["reward_after"]


def test_an_earlier_runs_files_are_moved_aside_and_never_mixed(state, tmp_path):
    trainer.step_update(state(seed=1))
    old = (tmp_path / "metrics" / "training_metrics.csv").read_text()
    trainer.step_update(state(seed=2))
    (aside,) = (tmp_path / "metrics").glob("previous-*")
    assert (aside / "training_metrics.csv").read_text() == old
    assert len((tmp_path / "metrics" / "training_metrics.csv").read_text().splitlines()) == 2


def test_the_loop_of_the_readme_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from fastppo import evaluate, init_state, step_update

    num_steps = 2
    state = init_state()
    for _step in range(num_steps):
        state = step_update(state)
    metrics = evaluate(state)
    assert metrics["steps"] == 2
    assert (tmp_path / "output" / "ppo_metrics" / "summary.json").is_file()


def test_every_metric_is_defined_in_the_docs():
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name, meaning in COLUMNS.items():
        assert f"| `{name}` | {meaning} |" in text
    assert f"| `{REWARD_COLUMN.format(name='<name>')}` | {REWARD_MEANING} |" in text


def test_trainer_reads_straight_down_in_under_150_lines():
    lines = (ROOT / "fastppo" / "ppo" / "trainer.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150


def test_preflight_gives_the_records_that_the_run_uses(config):
    settings = config(val_size=0.25)
    records = check(settings)
    assert (len(records.train), len(records.eval)) == (3, 1)


def test_the_first_lines_name_the_backend_that_runs(state, capsys):
    made = state()
    lines.first_lines(made, 1)
    assert f"ops: {choose('linear_policy_loss', None, torch.empty(0))}," in capsys.readouterr().out
