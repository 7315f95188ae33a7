"""The operators' tests on the device: the oracle, strides and alignments, races, scans.

They are those of tests/gpu, which need a GPU, and those of tests/ops/test_layouts.py on Triton's
backend; each is a row as soon as it has ended. Several processes share them, since they compile
many kernels.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.plan import Add, Plan
from benchmarks.gpu.sections import ROOT

# In this order, since the section may be cut off.
FILES = ("tests/gpu/test_real_sizes.py", "tests/ops/test_layouts.py", "tests/gpu/test_offload.py")
SHARED, OFFLOAD = FILES[:2], Path(FILES[2])  # which imports transformers: the last process
# Under the interpreter the layouts take a minute, and the suite has them anyway.
REHEARSED_LAYOUTS = ("token_kl",)


class Recorder:
    """Plugin of pytest that takes every so-many-th test, and writes a row for each."""

    def __init__(self, plan: Plan, add: Add) -> None:
        self.plan, self.add = plan, add
        self.wrong: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        order = {(ROOT / name).resolve(): place for place, name in enumerate(FILES)}
        kept = [item for item in items if self.is_wanted(item)]
        kept.sort(key=lambda item: order[item.path])
        number, count = self.plan.part
        shared = [item for item in kept if item.path.name != OFFLOAD.name]
        items[:] = shared[number::count] + kept[len(shared) :]

    def is_wanted(self, item: pytest.Item) -> bool:
        given = getattr(item, "callspec", None)
        parameters: dict[str, Any] = given.params if given is not None else {}
        if parameters.get("backend", "triton") != "triton":
            return False
        if self.plan.cuda or item.path.name != "test_layouts.py":
            return True
        return getattr(parameters.get("op"), "name", None) in REHEARSED_LAYOUTS

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, Any, Any]:
        report = yield
        if report.when != "call" and report.passed:
            return report
        name = f"{item.path.stem}::{item.name}"
        row = {"what": name, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            row["note"] = f"{report.when}: {last_line(report)}"
            self.wrong.append(name)
        self.add(**row)
        return report


def last_line(report: Any) -> str:
    """The line of a failed test that says what was wrong."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return next((line for line in text.splitlines() if line.strip()), "")[:300]


def measure(plan: Plan, add: Add) -> list[str]:
    """A row for each test; returns the names of those that failed."""
    recorder = Recorder(plan, add)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}"]
    last = plan.part[0] == plan.part[1] - 1
    files = [str(ROOT / name) for name in (FILES if plan.cuda and last else SHARED)]
    code = pytest.main([*options, *files], plugins=[recorder])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return [*recorder.wrong, f"pytest ended with {pytest.ExitCode(code).name}"]
    return recorder.wrong
