"""docs/migrate-trl.md is what the tables say, and its code is what the class takes."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from pathlib import Path

from fastppo import PPOConfig, PPOTrainer
from fastppo.ppo.columns import COLUMNS
from tests.trainer.migrate_page import METRICS, page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_made_from_the_tables():
    text = (ROOT / "docs" / "migrate-trl.md").read_text(encoding="utf-8")
    assert text == page(), "python -m tests.trainer.migrate_page > FILE, and copy that"


def calls(name):
    blocks = re.findall(r"```python\n(.*?)```", page(), flags=re.DOTALL)
    nodes = (node for block in blocks for node in ast.walk(ast.parse(block)))
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
