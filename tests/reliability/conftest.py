"""The unbroken runs that everything else is held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import runs
from tests.reward_server import Server, serving

SETTINGS = {"ppo": runs.ppo, "rm": runs.rm}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "reliability" in item.path.parts:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def unbroken(home: Path) -> Callable[[str], dict[str, Any]]:
    """What a stage leaves that nobody disturbs; run once."""
    known: dict[str, dict[str, Any]] = {}

    def get(stage: str) -> dict[str, Any]:
        if stage not in known:
            settings = SETTINGS[stage](home / f"unbroken-{stage}")
            code, said = runs.run(settings)
            assert code == 0, said
            known[stage] = runs.result(settings)
        return known[stage]

    return get


@pytest.fixture
def server() -> Iterator[Server]:
    """A reward server on this machine."""
    with serving() as made:
        yield made


@pytest.fixture
def settings(home: Path, request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """A stage's settings with a folder of their own."""

    def make(stage: str, **changes: Any) -> dict[str, Any]:
        name = "".join(c if c.isalnum() else "-" for c in request.node.name)
        return SETTINGS[stage](home / name, **changes)

    return make


# A line a file of this folder: how many faults were tried, how many survived.
tried: Counter[str] = Counter()
survived: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and "reliability" in report.nodeid:
        name = Path(report.location[0]).stem.removeprefix("test_")
        tried[name] += 1
        survived[name] += report.passed


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, count in tried.items():
        terminalreporter.write_line(f"{name}: {count} tried, {survived[name]} survived")
