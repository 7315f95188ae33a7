"""The examples that are no demo run as they stand."""

from __future__ import annotations

import json
import re
import runpy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers
from examples.gsm8k import reward as gsm8k
from fastppo import toy
from fastppo.cli import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
def test_the_ppo_trainer_learns_and_calls_back(capsys, monkeypatch, tmp_path):
    # 10 of its 30 steps, which take a minute.
    source = (EXAMPLES / "ppo_trainer.py").read_text(encoding="utf-8")
    short = tmp_path / "ppo_trainer.py"
    short.write_text(source.replace("max_steps=30", "max_steps=10"), encoding="utf-8")
    assert short.read_text(encoding="utf-8") != source
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(short), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"callback: after 320 responses the score is 0\.\d+", said)
    (before, after) = re.findall(r"reward (\S+) -> (\S+)\n", said)[-1]
    assert float(after) > float(before)
    assert (tmp_path / "ppo" / "adapter_model.safetensors").is_file()


def test_the_custom_loop_learns_and_its_trl_step_starts_at_ratio_1(capsys):
    runpy.run_path(str(EXAMPLES / "custom_loop.py"), run_name="__main__")
    said = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"epoch \d: loss (\S+)", said)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    # The policy that sampled is the one that trains, and advantages are whitened: mean 0.
    assert re.search(r"ppo/loss/policy -?0\.0000, .*clipfrac 0\.000", said)


RIGHT_OR_NOT = [
    ("It is 4.\n#### 4", "4", 1.0),
    ("#### 3, no: #### 1,200", "1200", 1.0),
    ("#### -7", "-7", 1.0),
    ("#### 4.", "4", 0.0),  # verl keeps the full stop
    ("####4", "4", 0.0),
    ("4", "4", 0.0),
    ("#### 4" + " and so on" * 40, "4", 0.0),  # too far from the end
]


def test_gsm8k_pays_for_the_number_after_the_last_mark():
    texts, answers, scores = map(list, zip(*RIGHT_OR_NOT, strict=True))
    assert gsm8k.score(texts, answers) == scores


@pytest.mark.peers
@pytest.mark.parametrize(("text", "answer", "score"), RIGHT_OR_NOT)
def test_gsm8k_is_paid_as_verl_pays_it(text, answer, score):
    theirs = peers.load("verl", "verl.utils.reward_score.gsm8k")
    assert theirs.compute_score(text, answer) == score == gsm8k.score([text], [answer])[0]


# What makes a recipe small enough for a test: a random model, one step, ten rows.
SMALL = {
    "template": "chatml",
    "max_new_tokens": "6",
    "per_device_train_batch_size": "8",
    "gradient_accumulation_steps": "1",
    "ppo_buffer_size": "1",
    "eval_max_samples": "4",
    "max_steps": "1",
    "bf16": "false",
    "metrics_dir": "metrics",
}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def walk(recipe: str, monkeypatch: pytest.MonkeyPatch, folder: Path, **models: str) -> Any:
    """Prepare ten rows and run the recipe's YAML on them; returns its summary."""
    name = recipe.partition("/")[0]
    monkeypatch.setattr(sys, "argv", ["prepare.py", "source"])
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds the checkout
    runpy.run_path(str(EXAMPLES / name / "prepare.py"), run_name="__main__")
    changes = [f"{key}={value}" for key, value in {**SMALL, **models}.items()]
    assert main([str(EXAMPLES / recipe), *changes]) == 0
    return json.loads((folder / "metrics" / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ppo", "grpo"])
def test_the_gsm8k_recipe_walks_on_ten_problems(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy.write_model(tmp_path / "model")
    (tmp_path / "source").mkdir()
    rows = [{"question": f"What is {i} + 1?", "answer": f"So.\n#### {i + 1}"} for i in range(10)]
    for split in ("train", "test"):
        write_lines(tmp_path / "source" / f"{split}.jsonl", rows)
    summary = walk(f"gsm8k/{recipe}.yaml", monkeypatch, tmp_path, model_name_or_path="model")
    assert summary["eval_prompts"] == 4
    assert summary["eval_prompts_held_out"]
    records = json.loads((tmp_path / "output" / "gsm8k" / "train.json").read_text())
    assert records[3]["answer"] == "4"
    assert records[3]["instruction"].startswith("What is 3 + 1? Let's think")
