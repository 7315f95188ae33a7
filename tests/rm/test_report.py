"""Stage rm: LLaMA-Factory's files, and evaluation of a reward model that was trained before."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from fastppo.cli import main
from tests.tiny import write_rm
from tests.written import LF_FILES, lines, read

REPORT_FILES = LF_FILES | {"generated_predictions.jsonl", "predict_results.json"}


@pytest.fixture(scope="module")
def trained_once(model_dir, tmp_path_factory):
    """A user's folder after a calibrated run that evaluates and predicts."""
    folder = tmp_path_factory.mktemp("trained")
    write_rm(
        folder,
        model_dir,
        per_device_train_batch_size=4,
        num_train_epochs=2,
        save_steps=3,
        calibrate_reward=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["rm.yaml", "do_train=true", "do_eval=true", "do_predict=true"]) == 0
    return folder


@pytest.fixture
def trained(trained_once, tmp_path, monkeypatch):
    """A copy of it for each test."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_run_leaves_llamafactorys_files(trained):
    out = trained / "out"
    assert {path.name for path in out.iterdir()} >= REPORT_FILES
    inside = {path.name for path in (out / "checkpoint-3").iterdir()}
    results = {"trainer_log.jsonl", "generated_predictions.jsonl"}
    assert inside >= {name for name in REPORT_FILES if "results" not in name} - results
    assert inside >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    train, evaluated, predicted = (
        read(out / f"{split}_results.json") for split in ("train", "eval", "predict")
    )
    assert {"train_loss", "train_runtime"} <= set(train)
    wanted = {"loss", "accuracy", "margin", "calibration_error", "chosen_score"}
    assert {f"eval_{name}" for name in wanted} <= set(evaluated)
    assert {f"predict_{name}" for name in wanted} <= set(predicted)
    assert read(out / "all_results.json") == {**train, **evaluated, **predicted}
    log = lines(out / "trainer_log.jsonl")
    assert {"loss", "lr", "epoch", "percentage", "remaining_time"} <= set(log[0])
    assert "accuracy" in ModelCard.load(out / "README.md").text


def test_predictions_are_of_the_calibrated_head_in_llamafactorys_keys(trained):
    """Results once described the head before `calibrate_reward` had scaled it."""
    rows = lines(trained / "out" / "generated_predictions.jsonl")
    assert len(rows) == 4
    margin = sum(row["chosen"] - row["rejected"] for row in rows) / 4
    assert read(trained / "out" / "eval_results.json")["eval_margin"] == pytest.approx(
        margin, abs=1e-4
    )
    scores = [score for row in rows for score in row.values()]
    assert sum(scores) / len(scores) == pytest.approx(0.0, abs=1e-3)


def test_evaluation_alone_finds_the_runs_own_numbers(trained):
    first = read(trained / "out" / "eval_results.json")
    state = (trained / "out" / "trainer_state.json").read_bytes()
    assert main(["rm.yaml", "do_eval=true"]) == 0
    again = read(trained / "out" / "eval_results.json")
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_calibration_error"):
        assert again[name] == pytest.approx(first[name], abs=1e-5)
    assert (trained / "out" / "trainer_state.json").read_bytes() == state


def test_a_checkpoint_says_where_its_scores_are_read(trained):
    """Without a record it would be taken for LLaMA-Factory's and read at the wrong token."""
    assert read(trained / "out" / "checkpoint-3" / "fastppo_reward.json")["score_at"] == "eos"


def test_another_folder_is_written_where_the_adapter_is_named(trained):
    words = ["do_predict=true", "adapter_name_or_path=out", "output_dir=predicted"]
    assert main(["rm.yaml", *words]) == 0
    found = lines(trained / "predicted" / "generated_predictions.jsonl")
    assert found == lines(trained / "out" / "generated_predictions.jsonl")
    assert not (trained / "predicted" / "adapter_model.safetensors").exists()


def test_a_reward_model_goes_on_training_with_its_head_and_its_place(trained):
    """LLaMA-Factory's continued adapter keeps its head; ours began a new one."""
    record = trained / "out" / "fastppo_reward.json"
    record.write_text(json.dumps({**read(record), "score_at": "suffix"}))
    words = ["adapter_name_or_path=out", "output_dir=more", "learning_rate=0", "max_steps=1"]
    assert main(["rm.yaml", *words, "calibrate_reward=false"]) == 0
    for name in ("value_head", "adapter_model"):
        before, after = (
            load_file(trained / folder / f"{name}.safetensors") for folder in ("out", "more")
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert read(trained / "more" / "fastppo_reward.json")["score_at"] == "suffix"
