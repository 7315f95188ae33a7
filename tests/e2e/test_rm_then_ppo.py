"""The whole way on a tiny model, by the command: pairs -> reward model -> PPO -> files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo import toy
from fastppo.cli import main
from fastppo.ppo.columns import COLUMNS, FILTER_COLUMNS, IMPORTANCE_COLUMNS

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a model, two data sets, and nothing else."""
    monkeypatch.chdir(tmp_path)
    toy.write_model(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    info = {
        "my_preference_data": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        },
        "my_ppo_prompts": {"file_name": "prompts.json"},
    }
    pairs = [
        {"instruction": f"Word {i}", "chosen": "aeiou " * 2, "rejected": "xyz " * 3}
        for i in range(16)
    ]
    prompts = [
        {"instruction": "写一句关于雨天的话。", "input": "要积极。"},
        {"instruction": "介绍一下北京。"},
        *({"instruction": f"Write {i}", "output": "never learned from"} for i in range(6)),
    ]
    for name, value in (("dataset_info", info), ("pairs", pairs), ("prompts", prompts)):
        text = json.dumps(value, ensure_ascii=False)
        (data / f"{name}.json").write_text(text, encoding="utf-8")
    return tmp_path


def write(path: Path, settings: dict) -> str:
    path.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    return str(path)


@pytest.mark.pictures
def test_pairs_to_reward_model_to_better_policy(project, capsys):
    common = {"model_name_or_path": "model", "finetuning_type": "lora", "template": "chatml"}
    reward = write(
        project / "reward.yaml",
        {
            **common,
            "stage": "rm",
            "dataset": "my_preference_data",
            "output_dir": "saves/reward",
            "per_device_train_batch_size": 4,
            "learning_rate": "1e-2",
            "num_train_epochs": 4,
            "val_size": 4,
            "calibrate_reward": True,
        },
    )
    assert main([reward]) == 0
    out = capsys.readouterr().out
    assert "stage rm" in out
    assert "12 pairs to train on, 4 held out" in out
    files = {path.name for path in (project / "saves" / "reward").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"} <= files
    assert {"fastppo_reward.json", "all_results.json", "trainer_state.json"} <= files
    keys = load_file(project / "saves" / "reward" / "value_head.safetensors").keys()
    assert set(keys) == {"v_head.summary.weight", "v_head.summary.bias"}
    results = json.loads((project / "saves" / "reward" / "all_results.json").read_text())
    assert results["eval_accuracy"] == 1.0

    ppo = write(
        project / "ppo.yaml",
        {
            **common,
            "stage": "ppo",
            "do_train": True,
            "reward_model": "saves/reward",
            "critic": "adapter",
            "dataset": "my_ppo_prompts",
            "val_size": 2,
            "output_dir": "saves/ppo",
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "ppo_epochs": 4,
            "learning_rate": 1.0e-2,
            "init_kl_coef": 0.001,
            "max_new_tokens": 12,
            "max_steps": 6,
            "save_steps": 4,
            "lr_scheduler_type": "constant",
        },
    )
    assert main([ppo]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.split()}
    assert rows["reference"] == rows["reward"] == "0"
    assert int(rows["actor"].replace(",", "")) > 0
    assert int(rows["critic"].replace(",", "")) > int(rows["actor"].replace(",", ""))
    assert "step 6/6" in out

    metrics = project / "output" / "ppo_metrics"
    summary = json.loads((metrics / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 6
    assert summary["eval_prompts_held_out"] is True
    assert summary["kl"] > 0
    with (metrics / "training_metrics.csv").open(newline="", encoding="utf-8") as file:
        steps = list(csv.DictReader(file))
    assert [row["step"] for row in steps] == ["1", "2", "3", "4", "5", "6"]
    off = {"kl_loss", "ptx_loss", "overflow_steps", "loss_scale", "guard_overflow"}  # keys left off
    assert set(COLUMNS) - set(steps[0]) == off | IMPORTANCE_COLUMNS | FILTER_COLUMNS
    assert (metrics / "training_curves.png").stat().st_size > 20_000

    saved = project / "saves" / "ppo"
    assert (saved / "checkpoint-4" / "training_state.safetensors").is_file()
    base = AutoModelForCausalLM.from_pretrained(project / "model")
    assert PeftModel.from_pretrained(base, str(saved)).active_adapter == "default"
    assert AutoTokenizer.from_pretrained(saved).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        pytest.param("reward", [], marks=pytest.mark.slow),  # which the next one runs too
        ("ppo", []),
        pytest.param("ppo", ["bf16=false", "fp16=true"], marks=pytest.mark.slow),  # for a T4
    ],
)
def test_the_tutorial_files_run_with_only_model_data_and_paths_changed(project, stage, precision):
    """What people copy, Chinese comments included; the first file has no do_train."""
    reward_overrides = [
        *precision,
        "model_name_or_path=model",
        "template=chatml",
        "output_dir=saves/reward",
        "num_train_epochs=1",
    ]
    assert main([str(FIXTURES / "tutorial_reward.yaml"), *reward_overrides]) == 0
    if stage == "reward":
        assert (project / "saves" / "reward" / "value_head.safetensors").is_file()
        return
    overrides = [
        *precision,
        "model_name_or_path=model",
        "template=chatml",
        "reward_model=saves/reward",
        "output_dir=saves/ppo",
        "max_new_tokens=6",
        "max_steps=1",
    ]
    assert main([str(FIXTURES / "tutorial_ppo.yaml"), *overrides]) == 0
    assert (project / "saves" / "ppo" / "adapter_model.safetensors").is_file()
    assert (project / "output" / "ppo_metrics" / "summary.json").is_file()
