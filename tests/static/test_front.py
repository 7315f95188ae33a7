"""AGENTS.md and the Dockerfile name what is there; nothing here runs what they say."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
AGENTS = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMMANDS = [
    line.partition(" #")[0].strip()
    for block in re.findall(r"```\n(.*?)```", AGENTS, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_agents_md_names_what_is_there(command):
    words = command.removeprefix(".venv/bin/").split()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if words[0] == "make":
        assert words[1] in targets
    if "-m" in words and words[0] == "python" and "pytest" not in words:
        assert importlib.util.find_spec(words[words.index("-m") + 1])
    paths = [word for word in words[1:] if re.match(r"(tests|docs|examples)/|setup.py", word)]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert words[0] in {"make", "python", "fastppo-train"}


def test_the_files_that_agents_md_names_are_there():
    named = re.findall(r"`((?:fastppo|tests|kernels|benchmarks)/[\w./<>*-]*)`", AGENTS)
    assert len(named) >= 10
    for name in named:
        assert list(ROOT.glob(name.replace("<op>", "value_loss"))), name


def instructions(text: str) -> list[tuple[str, str]]:
    """The Dockerfile's instructions with what they are given, comments and line ends taken out."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    found = [line.split(None, 1) for line in lines.replace("\\\n", " ").splitlines() if line]
    return [(name, " ".join(rest.split())) for name, rest in found]


def test_what_the_dockerfile_copies_is_there_and_let_through():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [
        word
        for name, given in instructions(DOCKERFILE)
        if name == "COPY"
        for word in given.split()[:-1]
    ]
    assert {"pyproject.toml", "setup.py", "kernels", "fastppo"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source
    assert ignored[1] == "*"


def test_the_dockerfile_installs_extras_that_are_there_and_claims_no_build():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pips = [given for name, given in instructions(DOCKERFILE) if "pip install" in given]
    (extras,) = [set(found.split(",")) for found in re.findall(r"\'\.\[(.*?)\]\'", " ".join(pips))]
    assert "train" in extras <= set(project["optional-dependencies"])
    assert {project["readme"], *project["license-files"]} <= set(DOCKERFILE.split())
    assert "has not been run yet" in DOCKERFILE


def test_the_dockerfile_starts_with_a_pinned_base_and_knows_its_words():
    found = instructions(DOCKERFILE)
    assert found[0][0] == "FROM"
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-\w+-ubuntu\d\d\.\d\d", found[0][1])
    assert {name for name, _ in found} <= {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "CMD"}
