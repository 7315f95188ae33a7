"""docs/troubleshooting.md shows lines that the program prints, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastppo.config import config_from_dict
from fastppo.memory.auto import advice_on_failure
from fastppo.memory.budgets import Budgets
from fastppo.memory.retry import OutOfMemory
from fastppo.models import rounding
from fastppo.run.launch import note_on_device
from tests.bad import AREAS, Case, cases
from tests.project import PPO

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md").read_text("utf-8")
LINES = re.findall(r"^(?:fastppo-train: |  )(error|stopped|note): (.*)$", PAGE, re.MULTILINE)
TABLE = cases(*AREAS)


def matches(shown: str, printed: str) -> bool:
    """Whether `printed` is the line that a page or a case has, in which `...` is anything."""
    return Case("", "", shown).is_said(printed)


def note_lines(tmp_path, monkeypatch) -> list[str | None]:
    """The notes of the page, from the functions that a run calls."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    old = tmp_path / "cpuinfo"
    old.write_text("flags : fpu avx2", encoding="utf-8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return [
        note_on_device(config_from_dict(PPO), cpu, old),
        rounding.note_on_16_bits(cuda, torch.bfloat16),
        rounding.note_on_16_bits(cpu, torch.bfloat16, old),
    ]


def test_the_page_has_the_mistakes_that_come_first():
    assert len(re.findall(r"^### ", PAGE, re.MULTILINE)) >= 20
    assert len(LINES) >= 30
    assert len(re.findall(r"^(?:fastppo-train|  note): ", PAGE, re.MULTILINE)) == len(LINES)


@pytest.mark.parametrize("line", [line for kind, line in LINES if kind == "error"])
def test_an_error_line_of_the_page_is_one_of_the_table(line):
    """The table's lines are run and compared whole, so the page's are what a user sees."""
    assert [case for case in TABLE if matches(line, case.line) or case.is_said(line)]


def test_the_notes_of_the_page_are_printed(tmp_path, monkeypatch):
    printed = note_lines(tmp_path, monkeypatch)
    shown = [line for kind, line in LINES if kind == "note"]
    assert len(shown) == len(printed)
    assert all(any(matches(line, said) for said in printed) for line in shown)


def test_the_line_on_memory_has_the_form_that_is_printed():
    """tests/memory/test_retry.py runs out of memory and holds the same two parts."""
    (shown,) = [line for kind, line in LINES if kind == "stopped"]
    first, cure = shown.split("; ")
    assert first.startswith("out of memory in update, also with ppo_max_token_len_per_gpu: ")
    config = config_from_dict(PPO)
    with (
        pytest.raises(Exception, match=re.escape(first)) as stopped,
        advice_on_failure(None, config, Budgets.of(config), torch.device("cpu")),
    ):
        raise OutOfMemory(first)
    assert str(stopped.value).startswith(f"{first}; ")
    assert cure == "the smallest changes that help: ..."


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md", "CHANGELOG.md"])
def test_the_count_of_wrong_inputs_is_the_tables(page):
    text = (Path(__file__).resolve().parents[2] / page).read_text("utf-8")
    assert re.findall(r"(\d+) (?:wrong inputs|种错误输入)|tested table of (\d+)", text)
    assert str(len(TABLE)) in text
