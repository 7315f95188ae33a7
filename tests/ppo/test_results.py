"""What stage ppo leaves in output_dir for LLaMA-Factory's users; evaluation without training."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

from fastppo.cli import main
from fastppo.run import results, samples
from tests.tiny import PROMPTS
from tests.written import LF_FILES, lines, read


def lay_out_project(folder: Path, model_dir: Path) -> None:
    """A user's folder with prompts to train on and prompts held out, one of them nasty."""
    rows = [{"instruction": text} for text in PROMPTS]
    held = [{"instruction": "说说雨。", "output": "雨```很好"}, {"instruction": "````\nfenced"}]
    for name, value in (("prompts", rows), ("held", held * 3)):
        text = json.dumps(value, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    settings = {
        "stage": "ppo",
        "model_name_or_path": str(model_dir),
        "reward_model": "fastppo.toy:vowels",
        "reward_model_type": "function",
        "critic": "shared",
        "dataset": "prompts.json",
        "eval_dataset": "held.json",
        "template": "chatml",
        "default_system": "",
        "output_dir": "out",
        "metrics_dir": "metrics",
        "per_device_train_batch_size": 4,
        "max_new_tokens": 8,
        "max_steps": 2,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "disable_gradient_checkpointing": True,
    }
    (folder / "ppo.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture
def project(model_dir, tmp_path, monkeypatch):
    """The folder before any run."""
    monkeypatch.chdir(tmp_path)
    lay_out_project(tmp_path, model_dir)
    return tmp_path


@pytest.fixture(scope="module")
def trained_once(model_dir, tmp_path_factory):
    """The folder after a run that evaluated after its first step too."""
    folder = tmp_path_factory.mktemp("trained")
    lay_out_project(folder, model_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["ppo.yaml", "eval_strategy=steps", "eval_steps=1", "do_train=true"]) == 0
    return folder


@pytest.fixture
def trained(trained_once, tmp_path, monkeypatch):
    """A copy of it for each test."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_output_dir_has_llamafactorys_files_and_checkpoints_their_shape(trained, model_dir):
    assert {path.name for path in (trained / "out").iterdir()} >= LF_FILES
    inside = {path.name for path in (trained / "out" / "checkpoint-1").iterdir()}
    assert inside >= {name for name in LF_FILES if "results" not in name} - {"trainer_log.jsonl"}
    for folder in (trained / "out", trained / "out" / "checkpoint-1"):
        base = AutoModelForCausalLM.from_pretrained(model_dir)
        assert PeftModel.from_pretrained(base, str(folder)).active_adapter == "default"
        assert AutoTokenizer.from_pretrained(folder).chat_template


def test_the_log_has_llamafactorys_keys_and_evaluations_their_step(trained):
    log = lines(trained / "out" / "trainer_log.jsonl")
    steps = [line for line in log if "loss" in line]
    assert [line["current_steps"] for line in steps] == [1, 2]
    wanted = {"current_steps", "total_steps", "loss", "reward", "lr", "epoch", "percentage"}
    assert set(steps[0]) == wanted | {"elapsed_time", "remaining_time"}
    assert steps[-1]["percentage"] == 100.0
    assert [line["current_steps"] for line in log if "eval_reward" in line] == [1, 2]
    state = TrainerState.load_from_json(str(trained / "out" / "trainer_state.json"))
    assert (state.global_step, state.max_steps) == (2, 2)
    assert [(e["step"], "reward" in e, "eval_reward" in e) for e in state.log_history] == [
        (1, True, False),
        (1, False, True),
        (2, True, False),
        (2, False, True),
    ]


def test_results_are_of_their_split_and_all_of_them_together(trained):
    out = trained / "out"
    train, evaluated = read(out / "train_results.json"), read(out / "eval_results.json")
    assert {"train_loss", "train_runtime", "train_reward", "epoch"} <= set(train)
    assert evaluated["eval_samples"] == 6
    assert 0.0 <= evaluated["eval_win_rate"] <= 1.0
    for name in ("reward", "length", "eos_share"):
        assert {f"eval_{name}", f"eval_{name}_reference"} <= set(evaluated)
    assert read(out / "all_results.json") == {**train, **evaluated}
    summary = read(trained / "metrics" / "summary.json")
    assert summary["win_rate"] == evaluated["eval_win_rate"]
    assert summary["reward_before"] == evaluated["eval_reward_reference"]


def test_a_resumed_run_goes_on_with_its_log_and_its_evaluations(trained):
    before = (trained / "out" / "trainer_log.jsonl").read_text()
    again = ["eval_strategy=steps", "eval_steps=1", "resume_from_checkpoint=out/checkpoint-1"]
    assert main(["ppo.yaml", *again]) == 0
    log = lines(trained / "out" / "trainer_log.jsonl")
    assert [(x["current_steps"], "loss" in x) for x in log] == [
        (x["current_steps"], "loss" in x) for x in map(json.loads, before.splitlines())
    ]
    history = read(trained / "out" / "trainer_state.json")["log_history"]
    assert [entry["step"] for entry in history] == [1, 1, 2, 2]


def test_the_sample_page_keeps_what_a_policy_says_inside_its_fences(trained):
    page = (trained / "out" / "eval_samples.md").read_text(encoding="utf-8")
    rows = lines(trained / "out" / "eval_samples.jsonl")
    assert len(rows) == 6
    assert "说说雨。" in page
    assert "`````text\n````\nfenced\n`````" in page
    assert "````text\n雨```很好\n````" in page
    won = {"win": 1.0, "tie": 0.5, "loss": 0.0}
    rate = sum(won[row["outcome"]] for row in rows) / 6
    assert rate == read(trained / "out" / "eval_results.json")["eval_win_rate"]


def test_a_win_is_a_higher_reward_and_a_tie_half_of_one():
    assert samples.win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 4.0, 3.0]) == 0.625
    assert samples.outcome(1.0, 1.0) == "tie"


def test_the_card_names_base_data_reward_and_results(trained):
    card = ModelCard.load(trained / "out" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a folder on somebody's disk is none of the hub's
    text = card.text
    for words in ("prompts.json", "`vowels` (function)", "| eval_reward |", "6 held-out prompts"):
        assert words in text
    named = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert named["eval_reward"] == read(trained / "out" / "eval_results.json")["eval_reward"]


def test_a_base_with_a_licence_passes_it_on(project, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    assert main(["ppo.yaml", "model_name_or_path=base", "max_steps=1"]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "is under `apache-2.0`" in card.text


def test_evaluation_alone_finds_the_runs_own_numbers_and_leaves_its_metrics(trained):
    """The same file with do_eval in place of do_train: output_dir is the policy."""
    first = read(trained / "out" / "eval_results.json")
    log = (trained / "out" / "trainer_log.jsonl").read_text()
    metrics = {path.name: path.read_bytes() for path in (trained / "metrics").iterdir()}
    assert main(["ppo.yaml", "do_eval=true"]) == 0
    again = read(trained / "out" / "eval_results.json")
    for name in ("eval_reward", "eval_kl", "eval_reward_reference", "eval_win_rate"):
        assert again[name] == pytest.approx(first[name], abs=1e-6)
    assert again["eval_kl"] > 0
    assert {p.name: p.read_bytes() for p in (trained / "metrics").iterdir()} == metrics
    assert (trained / "out" / "trainer_log.jsonl").read_text() == log


def test_a_policy_that_trained_whole_is_evaluated_against_its_base(project):
    words = ["finetuning_type=full", "max_steps=1"]
    assert main(["ppo.yaml", *words]) == 0
    first = read(project / "out" / "eval_results.json")
    assert main(["ppo.yaml", *words, "do_eval=true"]) == 0
    again = read(project / "out" / "eval_results.json")
    assert again["eval_kl"] == pytest.approx(first["eval_kl"], abs=1e-6)
    assert again["eval_kl"] != 0


def test_an_adapter_is_evaluated_and_predicts_into_another_folder(trained):
    """LLaMA-Factory's way, from the file alone: no dataset, another rank than the adapter's."""
    settings = yaml.safe_load(Path("ppo.yaml").read_text())
    del settings["dataset"]
    settings |= {"adapter_name_or_path": "out", "output_dir": "eval", "lora_rank": 2}
    settings |= {"do_eval": True, "do_predict": True, "eval_max_samples": 2}
    Path("eval.yaml").write_text(yaml.safe_dump(settings))
    assert main(["eval.yaml"]) == 0
    found = read(trained / "eval" / "eval_results.json")
    assert found["eval_samples"] == 2
    assert found["eval_kl"] > 0
    rows = lines(trained / "eval" / "generated_predictions.jsonl")
    assert [row["label"] for row in rows] == ["雨```很好", ""] * 3
    assert set(rows[0]) == {"prompt", "predict", "label", "reward"}
    predicted = read(trained / "eval" / "predict_results.json")
    assert predicted["predict_samples"] == 6
    assert read(trained / "eval" / "all_results.json") == {**found, **predicted}
    assert not (trained / "eval" / "trainer_state.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["do_train=false"], "do_train: false leaves nothing to do"),
        (["do_predict=true", "eval_dataset=null"], "do_predict: nothing is held out"),
        (["do_eval=true"], "nothing trained"),
        (["do_eval=true", "adapter_name_or_path=nowhere"], "nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_evaluation_of_nothing_is_one_line(project, capsys, changes, words):
    assert main(["ppo.yaml", *changes]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert not (project / "out").exists()


def test_a_log_that_goes_on_drops_the_lines_of_steps_to_come(tmp_path):
    results.begin_log(tmp_path)
    for step in (1, 2, 3):
        entry = {"loss": 0.5, "learning_rate": 1e-3}
        results.log_line(tmp_path, entry, step=step, total_steps=4, seconds=60.0 * step)
    results.begin_log(tmp_path, 2)
    results.log_line(tmp_path, {"loss": 0.25}, step=3, total_steps=4, seconds=180.0)
    found = lines(tmp_path / "trainer_log.jsonl")
    assert [(line["current_steps"], line["loss"]) for line in found] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.25),
    ]
    assert found[0]["lr"] == 1e-3
    assert (found[1]["elapsed_time"], found[1]["remaining_time"]) == ("0:02:00", "0:02:00")


def test_evaluation_md_names_what_is_written(trained):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    policy = page.split("## A policy")[1].split("## A reward model")[0]
    table = "\n".join(line for line in policy.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`(eval_\w+)`", table)) - {"eval_judge", "eval_judge_reference"}
    assert named - {"eval_results", "eval_best_step"} == set(
        read(trained / "out" / "eval_results.json")
    ) - {"epoch"}
