"""The recipes in examples/ on a tiny model and ten rows: data, runs, files, as their pages say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.gsm8k.reward import exact, last_answer
from fastppo import toy
from fastppo.cli import main
from tests.limits import HANGS

ROOT = Path(__file__).parents[2]
# What makes a recipe fit a tiny model on a CPU; everything else is the file's own.
TINY = ["model_name_or_path=model", "bf16=false", "max_new_tokens=8", "cutoff_len=256"]
TINY += ["per_device_train_batch_size=2", "gradient_accumulation_steps=2", "max_steps=1"]
PPO = ["ppo_buffer_size=2", "per_device_eval_batch_size=4", "eval_max_samples=4", "eval_steps=1"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with a tiny model and the package of examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    toy.write_model(tmp_path / "model")
    return tmp_path


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(name: str, folder: Path) -> None:
    command = [sys.executable, "-m", f"examples.{name}.make_data", "raw"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    subprocess.run(command, check=True, cwd=folder, env=environment, timeout=HANGS)


def recipe(name: str) -> str:
    return str(ROOT / "examples" / name)


def results(folder: Path) -> dict:
    return json.loads((folder / "eval_results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_gsm8k(folder, name):
    rows = [
        {"question": f"What is {i} and 1000?", "answer": f"It is {i}+1000.\n#### 1,00{i}"}
        for i in range(10)
    ]
    for split in ("train", "test"):
        write_jsonl(folder / "raw" / f"{split}.jsonl", rows)
    make_data("gsm8k", folder)
    made = json.loads((folder / "output" / "gsm8k" / "data" / "train.json").read_text())
    assert len(made) == 10
    assert made[3]["answer"] == "1003"
    assert made[3]["instruction"].startswith("What is 3 and 1000? Let's think step by step")
    more = ["num_generations=2", "max_num_gen_batches=2"] if name == "grpo" else []
    assert main([recipe(f"gsm8k/{name}.yaml"), *TINY, *PPO, *more]) == 0
    found = results(folder / "output" / "gsm8k" / name)
    assert 0 <= found["eval_reward"] <= 1
    assert found["eval_samples"] == 4


@pytest.mark.slow
def test_tldr(folder):
    posts = [
        {"prompt": f"SUBREDDIT: r/x\n\nPOST: {i}\n\nTL;DR:", "completion": f" Number {i}."}
        for i in range(10)
    ]
    pairs = [
        {"prompt": p["prompt"], "chosen": " It.", "rejected": f" No {i}"}
        for i, p in enumerate(posts)
    ]
    for split in ("train", "test"):
        write_jsonl(folder / "raw" / f"prompts-{split}.jsonl", posts)
        write_jsonl(folder / "raw" / f"pairs-{split}.jsonl", pairs)
    make_data("tldr", folder)
    assert main([recipe("tldr/reward.yaml"), *TINY[:2], *TINY[3:], "lora_rank=4"]) == 0
    assert "eval_accuracy" in results(folder / "output" / "tldr" / "reward")
    assert main([recipe("tldr/ppo.yaml"), *TINY, *PPO, "lora_rank=4"]) == 0
    out = folder / "output" / "tldr" / "ppo"
    assert "eval_win_rate" in results(out)
    predicted = (out / "generated_predictions.jsonl").read_text().splitlines()
    assert len(predicted) == 10
    assert json.loads(predicted[2])["label"].strip() == "Number 2."


def test_the_reward_of_gsm8k_by_hand():
    texts = ["so #### 1,234", "#### 5 no, #### 7", "7", "#### 7 and" + 300 * " ", "####7"]
    assert [last_answer(text) for text in texts] == ["1234", "7", None, None, None]
    assert exact(completions=texts, answer=["1234", "5", "7", "7", "7"]) == [
        1.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ]
