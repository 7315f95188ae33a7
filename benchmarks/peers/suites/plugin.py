"""The plugin of pytest that puts our adapters into a peer's test modules and reports each test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import suites

_found: dict[str, dict[str, Any]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peer", choices=suites.PEERS, required=True)
    parser.addoption("--found", required=True, help="the file to write results to")


def pytest_configure(config: pytest.Config) -> None:
    prepare = suites.suite_of(config.getoption("--peer")).prepare
    if prepare is not None:
        prepare(Path.cwd())


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    replaced = suites.suite_of(config.getoption("--peer")).replaced
    for module in {item.module for item in items}:
        for name, adapter in replaced.items():
            if hasattr(module, name):
                setattr(module, name, adapter)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[None]:
    report = yield
    entry = _found.setdefault(item.name, {"outcome": "passed", "reached": False, "why": ""})
    if call.when == "setup":
        entry["before"] = suites.calls
    if call.when == "call":
        entry["reached"] = suites.calls > entry["before"]
    if report.outcome != "passed":
        entry["outcome"] = report.outcome
        said = call.excinfo.exconly() if call.excinfo is not None else ""
        entry["why"] = said.strip().splitlines()[0][:300] if said.strip() else ""
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    for entry in _found.values():
        entry.pop("before", None)
    Path(session.config.getoption("--found")).write_text(json.dumps(_found), encoding="utf-8")
