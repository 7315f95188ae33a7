"""The first pages: their code runs, both languages say the same, and what they install is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """Blocks of code without their comments, which are translated."""
    found = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(r"[ \t]*# .*", "", block) for block in found]


def tables(text: str) -> list[list[str]]:
    """The numbers of each row of each table, in the order in which they stand."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [sorted(re.findall(r"\d+(?:\.\d+)*", row)) for row in rows]


def headings(text: str) -> list[str]:
    return re.findall(r"^(#+) ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)


def links(text: str) -> set[str]:
    return set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README.zh-CN.md"}


def code_of(page: str) -> str:
    """The page's blocks of code, one after the other as they are read."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


@pytest.mark.parametrize("page", ["README.md", "docs/ops.md"])
def test_the_code_on_the_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(page), page, "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("part", [headings, blocks, tables, links], ids=lambda part: part.__name__)
def test_the_chinese_readme_is_the_whole_of_the_english_one(part):
    assert part(README)
    assert part(CHINESE) == part(README)


def test_each_readme_leads_to_the_other_before_anything_else():
    assert re.search(r"\]\(([^)]+)\)", README)[1] == "README.zh-CN.md"
    assert re.search(r"\]\(([^)]+)\)", CHINESE)[1] == "README.md"


def test_what_it_is_and_how_to_start_stand_on_the_first_screen():
    first = README.splitlines()[:50]
    for words in ("maintained", "make demo", "before ┃ after", "pip install '.[train]'"):
        assert any(words in line for line in first), words
    assert len(README) < 9000


def test_every_page_can_be_reached_from_the_readme():
    found, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        found.add(page)
        text = page.read_text(encoding="utf-8")
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(text)}
        left += [x for x in targets - found if x.suffix == ".md" and x.is_file()]
    assert [path.name for path in (ROOT / "docs").glob("*.md") if path not in found] == []


def test_the_number_of_faults_is_that_of_their_table():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*`test_\w+\.py` \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    tried, survived = (sum(map(int, column)) for column in zip(*rows, strict=True))
    assert tried == survived == int(re.search(r"(\d+) faults tried", README)[1])


@pytest.mark.parametrize("wrong", ["pip install fastppo", "uvx fastppo", "pip install 'fastppo"])
def test_no_page_installs_a_name_that_is_not_ours(wrong):
    """The name is free in the index: whoever takes it would run on the reader's machine."""
    shown = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    paths = [ROOT / name for name in shown if name != "tests/static/test_readme.py"]
    texts = {p: p.read_text(encoding="utf-8", errors="ignore") for p in paths if p.is_file()}
    assert len(texts) > 100
    assert [p.name for p, text in texts.items() if wrong in text] == []
