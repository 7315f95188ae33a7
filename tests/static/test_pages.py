"""The pages quote code and name tests: both have to be there."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from fastppo.config import config_from_dict
from fastppo.export.config import REFUSED, ExportConfig
from fastppo.rewards.server import MAX_ANSWER, TOKEN
from fastppo.servers.client import FIRST_WAIT, LONGEST_WAIT

ROOT = Path(__file__).resolve().parents[2]
PPO = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
PITFALLS = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_every_line_of_code_that_ppo_md_quotes_is_in_the_file_it_names():
    quotes = re.findall(r"```python\n\s*# (\S+)\n(.*?)```", PPO, flags=re.DOTALL)
    assert len(quotes) >= 6
    for name, code in quotes:
        source = squeezed((ROOT / name).read_text(encoding="utf-8"))
        for line in code.strip().splitlines():
            assert squeezed(line) in source, f"{name} has no line {line.strip()!r}"


def test_every_item_of_the_checklist_names_a_test_that_is_there():
    rows = re.findall(r"^\| (\d+) \|.*\| `(test_\w+)` \|$", PITFALLS, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 49))
    tests = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    missing = [name for _, name in rows if f"def {name}(" not in tests]
    assert not missing


def test_every_yaml_of_rewards_md_is_a_configuration():
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    base = {"stage": "ppo", "model_name_or_path": "m", "dataset": "d", "output_dir": "o"}
    kinds = [
        spec.kind
        for block in blocks
        for spec in config_from_dict({**base, **yaml.safe_load(block)}).rewards
    ]
    assert kinds == ["lora", "full", "api", "function", "lora", "function", "function"]


def test_what_rewards_md_says_of_the_server_is_in_the_code():
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    for words in (f"`{TOKEN}`", f"0.5, 1, 2, ... {LONGEST_WAIT:g} s", "over 1 MiB"):
        assert words in page
    assert (FIRST_WAIT, MAX_ANSWER) == (0.5, 2**20)


def test_export_md_has_every_key_of_an_export():
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    words = {None: "`null`", True: "`true`", False: "`false`"}
    for name, field in ExportConfig.model_fields.items():
        default = words.get(field.default, f"`{field.default}`")
        default = "*needed*" if field.is_required() else default
        assert f"| `{name}` | {default} | {field.description} |" in page
    for name in REFUSED:
        assert f"`{name}" in page
