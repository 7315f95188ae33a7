"""The README's numbers are those of the committed results, and its code runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_of(page: str) -> str:
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL
    )
    return code


def test_the_table_of_seeds_is_the_committed_result():
    result = json.loads((ROOT / "benchmarks" / "results" / "demo_seeds.json").read_text())
    rows = []
    for run in result["runs"]:
        cells = [
            f"{run['judge_before']:+.2f}",
            f"{run['judge_after']:+.2f}",
            f"{run['reward_before']:+.2f}",
            f"{run['reward_after']:+.2f}",
            f"{run['kl']:.1f}",
            f"{run['length_before']:.0f}",
            f"{run['length_after']:.0f}",
        ]
        rows.append(f"| {run['seed']} | " + " | ".join(cells) + " |")
    for row in rows:
        assert row in README
    assert result["machine"] in README
    assert result["date"] in README


@pytest.mark.parametrize("page", ["README.md", "docs/ops.md"])
def test_the_code_on_the_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(page), page, "exec"), {})
    assert capsys.readouterr().out.strip()
