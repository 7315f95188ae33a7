"""Everything wrong that is tested: one table, in a file for each area.

A case of these files says what is `wrong`, how the good project of `tests/project.py` is
spoilt, and the `line` that is printed; `...` in it stands for what differs from run to run. Two
loops run the cases through `main(argv)` (`tests/config/test_bad_input.py` without torch,
`tests/run/test_bad_models.py` with tiny models), one calls the ops (`tests/ops/test_bad.py`),
and `docs/bad_input.md` is made from them (`page.py`).

    keys, without, stage    changes to the run's file, a key left out, rm in place of ppo
    command                 of COMMANDS, in place of fastppo-train
    text, arguments         the whole file, or the whole command line, in place of the usual
    entry                   a dataset_info.json of the one set `d`, which the run then names
    files                   path -> content: text, bytes, JSON; null takes the file away
    patch                   path -> keys that a JSON file there gets or, with null, loses
    cut                     path -> so many bytes are left of the file
    heads                   folder -> hidden size of a value head that is put there
    links, folders          path -> what it points to; empty folders
    pickles                 paths of torch files that would run code where they are unpickled
    tensors                 path -> name -> shape of a tensor of zeros, as safetensors or .bin
    without_packages        modules that are not installed
    environment             variables of the environment
    secret                  text that must be in nothing that is printed
    answers                 what a real server on this machine answers, one after the other
    call                    a Python expression with fastppo.ops' names and small inputs
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parent
# Five modules of tests read the table when they are imported, and PyYAML's own parser takes seconds
# for it; libyaml's is there in PyYAML's wheels.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Area -> its heading on the page.
AREAS = {
    "command_line": "Command line and file",
    "report": "fastppo-report",
    "export": "fastppo-export",
    "export_models": "fastppo-export: models and adapters",
    "launch": "python -m fastppo.launch.ray",
    "keys": "Keys, one by one",
    "together": "Keys against another, and against the disk",
    "roles": "Roles",
    "data": "Data",
    "rewards": "Rewards",
    "models": "Models and adapters",
    "checkpoints": "Checkpoints",
    "endpoints": "Reward servers",
    "functions": "Reward functions",
    "ops": "Operators",
}
# Refused before torch is imported, and by what needs a model to see it.
LIGHT = (
    *("command_line", "report", "export", "launch", "keys", "together", "roles", "data", "rewards"),
    "checkpoints",
)
HEAVY = ("models", "export_models", "endpoints", "functions")
# Command, as its lines begin -> the module of its `main`.
COMMANDS = {
    "fastppo-train": "fastppo.cli",
    "fastppo-report": "fastppo.report.cli",
    "fastppo-export": "fastppo.export.cli",
    "fastppo.launch.ray": "fastppo.launch.ray",
}


@dataclass(frozen=True)
class Case:
    """One wrong input, and the line that it gets."""

    area: str
    wrong: str
    line: str
    command: str = "fastppo-train"
    keys: dict[str, Any] = field(default_factory=dict)
    without: str = ""
    stage: str = "ppo"
    text: str | bytes | None = None
    arguments: list[str] | None = None
    entry: Any = None
    files: dict[str, Any] = field(default_factory=dict)
    patch: dict[str, dict[str, Any]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    pickles: list[str] = field(default_factory=list)
    tensors: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    without_packages: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    secret: str = ""
    answers: list[dict[str, Any]] = field(default_factory=list)
    call: str = ""

    def run(self, argv: list[str]) -> int:
        """Run the command in this process; returns its exit code."""
        code: int = importlib.import_module(COMMANDS[self.command]).main(argv)
        return code

    def is_said(self, line: str) -> bool:
        """Whether `line` is the one that is promised."""
        parts = (re.escape(part) for part in self.line.split("..."))
        return re.fullmatch(".*".join(parts), line) is not None

    def settings(self, good: dict[str, Any]) -> dict[str, Any]:
        """The keys of the run's file."""
        named = {"dataset": "d"} if self.entry is not None else {}
        found = {**good, **named, **self.keys}
        found.pop(self.without, None)
        return found

    def hide_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hide `without_packages` from every question whether a package is installed."""
        find = importlib.util.find_spec

        def find_others(name: str, package: str | None = None) -> Any:
            return None if name in self.without_packages else find(name, package)

        monkeypatch.setattr("importlib.util.find_spec", find_others)

    def spoil(self, project: Path, good: dict[str, Any]) -> list[str]:
        """Spoil the project, and give the command line."""
        text = self.text
        if text is None:
            text = yaml.safe_dump(self.settings(good), allow_unicode=True)
        given = {"run.yaml": text, **self.files}
        if self.entry is not None:
            given["data/dataset_info.json"] = {"d": self.entry}
        for path in self.folders:
            (project / path).mkdir(parents=True)
        for path, content in given.items():
            put(project / path, content)
        for path, changes in self.patch.items():
            found = {**json.loads((project / path).read_text(encoding="utf-8")), **changes}
            put(project / path, {key: x for key, x in found.items() if x is not None})
        for path, size in self.cut.items():
            put(project / path, (project / path).read_bytes()[:size])
        for path, target in self.links.items():
            (project / path).symlink_to(target)
        return ["run.yaml"] if self.arguments is None else self.arguments


def put(path: Path, content: Any) -> None:
    """Write text, bytes, or what is neither as JSON; take the file away for None."""
    if content is None:
        path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict) and "repeat" in content:
        middle = content["repeat"] * content["times"]
        content = content.get("before", "") + middle + content.get("after", "")
    if not isinstance(content, str | bytes):
        content = json.dumps(content, ensure_ascii=False)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def table(path: Path) -> Any:
    """What a file of the table holds."""
    return yaml.load(path.read_text(encoding="utf-8"), LOADER)


@cache
def cases_of(area: str) -> tuple[Case, ...]:
    return tuple(Case(area, **entry) for entry in table(FOLDER / f"{area}.yaml"))


def cases(*areas: str) -> list[Case]:
    """The cases of these areas, in the order of the page."""
    return [case for area in areas for case in cases_of(area)]
