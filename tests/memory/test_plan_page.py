"""What docs/memory.md shows of the plan; its table: python -m tests.memory.test_plan_page."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastppo.cli import main
from fastppo.config import Config, load_config
from fastppo.memory.advice import advise, choose_offloading, format_settings
from fastppo.memory.plan import plan_config
from fastppo.memory.units import GIB
from tests.memory.test_plan import PPO, REWARD, ROOT


def test_the_page_shows_what_the_command_prints(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["examples/qwen2.5-7b-ppo.yaml", "--plan", "--gpu", "22.5GiB"]) == 0
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert f"```\n{capsys.readouterr().out}```\n" in page


@pytest.mark.parametrize("file", [PPO, REWARD])
def test_the_page_has_the_peaks_of_the_examples_on_four_cards(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for row in cards(f"examples/{file.name}"):
        assert row in page


def cards(file: str) -> list[str]:
    """Rows of the page's table: a card, the peak, and what makes it fit."""
    rows = []
    for card in (16, 24, 48, 80):
        plan, _ = plan_config(load_config(file), "gpu")
        plan = plan.with_changes(**choose_offloading(plan, card * GIB))
        name = f"`{Path(file).stem}` | {card} GiB | {plan.peak.total / GIB:.2f}"
        if plan.fits(card * GIB):
            rows.append(f"| {name} | fits, {card - plan.peak.total / GIB:.2f} to spare |")
            continue
        steps = advise(plan, card * GIB, Config.model_fields).steps
        words = "; ".join(f"`{format_settings(step.settings)}`" for step in steps)
        rows.append(f"| {name} | {words}: {steps[-1].peak / GIB:.2f} |")
    return rows


if __name__ == "__main__":
    print("\n".join(row for file in (PPO, REWARD) for row in cards(f"examples/{file.name}")))
