"""docs/migrate-trl.md is what the tables say, and its code is what the class takes."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fastppo import PPOConfig, PPOTrainer
from fastppo.ppo.columns import COLUMNS
from fastppo.trainer.settings import FORMER
from tests.trainer.conftest import lora
from tests.trainer.migrate_page import METRICS, page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_made_from_the_tables():
    text = (ROOT / "docs" / "migrate-trl.md").read_text(encoding="utf-8")
    assert text == page(), "python -m tests.trainer.migrate_page > FILE, and copy that"


def blocks():
    return re.findall(r"```python\n(.*?)```", page(), flags=re.DOTALL)


def calls(name):
    nodes = (node for block in blocks() for node in ast.walk(ast.parse(block)))
    return [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") == name]


def test_settings_before_and_after_are_the_same():
    found = []
    for call in calls("PPOConfig"):
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(PPOConfig(**given, use_cpu=True).keys())
    before, after = found
    assert before == after


def test_the_arguments_of_the_page_are_those_of_the_class():
    names = set(inspect.signature(PPOTrainer.__init__).parameters) - {"self", "former"}
    for call in calls("PPOTrainer"):
        assert {keyword.arg for keyword in call.keywords} <= names
    table = page().partition("## Arguments of PPOTrainer")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE)[1:]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == names


def test_the_metrics_of_the_page_are_columns():
    names = re.findall(r"\| (`[^|]*`) \|$", METRICS, flags=re.MULTILINE)
    named = {name for cell in names for name in re.findall(r"`(\w+)`", cell)}
    assert named - {"reward"} <= set(COLUMNS)


# Sizes of the page's runs -> sizes for a test; the same number of responses a step each.
SMALL = {
    "per_device_train_batch_size=64": "per_device_train_batch_size=2",
    "total_episodes=10000": "total_episodes=2",
    "max_steps=157": "max_steps=1",
    "response_length=53": "response_length=4",
    "max_new_tokens=53": "max_new_tokens=4",
    '    output_dir="ppo",\n': '    output_dir="ppo",\n    use_cpu=True,\n',
}


@pytest.mark.slow  # three runs of a step
@pytest.mark.filterwarnings("ignore")  # a name of TRL's is a line on what it became
def test_the_code_of_the_page_runs(model_dir, tmp_path, monkeypatch):
    """Before, with the import of after, and after; then what 0.9.6's loop became."""
    before, imports, after, loop = blocks()
    own = {"num_labels": 1, "pad_token_id": 0}
    classifier = AutoModelForSequenceClassification.from_pretrained
    for part in (f"{imports}\n{before.partition(chr(10))[2]}", after):
        for large, small in SMALL.items():
            part = part.replace(large, small)
        folder = tmp_path / str(len(part))
        folder.mkdir()
        monkeypatch.chdir(folder)
        given = {
            "PPOConfig": PPOConfig,
            "PPOTrainer": PPOTrainer,
            "tokenizer": AutoTokenizer.from_pretrained(model_dir),
            "policy": AutoModelForCausalLM.from_pretrained(model_dir),
            "ref_policy": AutoModelForCausalLM.from_pretrained(model_dir),
            "reward_model": classifier(model_dir, **own),
            "value_model": classifier(model_dir, **own),
            "train_dataset": [{"input_ids": [70, 71, 72]}, {"input_ids": [80, 81]}],
            "eval_dataset": [{"input_ids": [70, 71]}],
            "peft_config": lora(),
        }
        exec(compile(part, "docs/migrate-trl.md", "exec"), given)
        assert given["trainer"].state.global_step == 1
        assert (folder / "ppo" / "adapter_model.safetensors").is_file()
    assert given["rows"][0].keys() == {"prompt", "completion", "reward"}
    few = {"max_new_tokens": 4, "eval_max_samples": 1}
    given |= {
        "model": AutoModelForCausalLM.from_pretrained(model_dir),
        "config": PPOConfig(
            output_dir="loop", use_cpu=True, batch_size=2, mini_batch_size=1, steps=2, **few
        ),
        "dataset": [{"query": "Hi", "input_ids": [70, 71, 72]}],
        "sentiment_pipe": lambda texts: [{"label": "POSITIVE", "score": 0.5} for _ in texts],
    }
    exec(compile(loop, "docs/migrate-trl.md", "exec"), given)
    assert given["trainer"].state.global_step == 1


def test_former_names_of_arguments_are_those_that_are_refused():
    table = page().partition("| TRL 0.9.6 | here |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"(\w+)=", row)}
    assert named == set(FORMER) - {"policy", "ref_policy"}  # 0.12's
