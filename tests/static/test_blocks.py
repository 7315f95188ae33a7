"""Blocks of code on every page: Python compiles, commands have the options, YAML the keys."""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fastppo.config import config_from_dict
from fastppo.config.ppo import ALIASES
from fastppo.config.schema import INTERNAL, Config
from fastppo.export.config import ExportConfig
from tests.static.test_text import ROOT, files

PAGES = [path for path in files() if path.suffix == ".md"]
BLOCK = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
PPO = {
    "stage": "ppo",
    "model_name_or_path": "m",
    "reward_model": "r",
    "dataset": "d",
    "output_dir": "o",
}
# Command -> its options, and the keys that it takes as key=value.
COMMANDS = {
    "fastppo-train": (
        {"--explain", "--plan", "--gpu", "--gpus", "--help", "--version"},
        {*Config.model_fields, *ALIASES} - INTERNAL,
    ),
    "fastppo-export": ({"--help", "--version"}, {*ExportConfig.model_fields, "stage"}),
    "fastppo-report": ({"--out", "--help", "--version"}, set[str]()),
}


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each block of code."""
    for _, language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        yield language, textwrap.dedent(text)


def of_language(language: str) -> list[pytest.param]:
    """Every block in a language, by its page."""
    return [
        pytest.param(text, id=f"{page.relative_to(ROOT)}-{i}")
        for page in PAGES
        for i, (found, text) in enumerate(blocks(page))
        if found == language
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every line of a block that begins with one of our commands."""
    for line in text.replace("\\\n", " ").splitlines():
        first = line.strip().removeprefix("$ ").removeprefix(".venv/bin/").partition(" ")[0]
        if first in COMMANDS:  # and not "fastppo-train: error: ..."
            yield shlex.split(line.strip(), comments=True)


SHELL = [
    pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)}")
    for page in PAGES
    for _, text in blocks(page)
    for words in commands(text)
]


@pytest.mark.parametrize("code", of_language("python"))
def test_python_compiles(code):
    if re.match(r"# fastppo/\S+\.py\n", code):  # a quotation: tests/static/test_pages.py has it
        return
    compile(code, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("words", SHELL)
def test_a_command_has_the_options_and_keys_that_a_page_gives_it(words):
    options, keys = COMMANDS[words[0].removeprefix("$").rpartition("/")[2]]
    given = [word for word in words[1:] if word.startswith("-")]
    assert set(given) <= options
    named = [word.partition("=")[0] for word in words[1:] if "=" in word]
    assert set(named) <= keys


@pytest.mark.parametrize("text", of_language("yaml"))
def test_yaml_is_a_configuration(text):
    given = yaml.safe_load(text)
    whole = "stage" in given
    config = config_from_dict(given if whole else {**PPO, **given})
    assert not config.ignored


def test_the_pages_have_blocks_of_each_kind():
    counts = [len(of_language("python")), len(SHELL), len(of_language("yaml"))]
    assert all(found >= least for found, least in zip(counts, (20, 15, 6), strict=True)), counts


def slug(heading: str) -> str:
    """The anchor that GitHub and the site give a heading."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        found[slug(heading)] = found.get(slug(heading), -1) + 1
    return {f"{name}-{i}" if i else name for name, n in found.items() for i in range(n + 1)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_anchors_of_links_are_headings(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    wrong = []
    for name, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", text):
        target = (page.parent / name) if name else page
        if target.suffix == ".md" and anchor not in anchors(target):
            wrong.append(f"{name}#{anchor}")
    assert wrong == []
