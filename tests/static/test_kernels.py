"""The static gate: what the machine code of every kernel must not do, on every target."""

from __future__ import annotations

import ast
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.static.gate import (
    FAST,
    GREEDY,
    SLOW,
    Reading,
    all_kernels,
    cases,
    limits,
    most_registers,
    readings,
    table,
)

ROOT = Path(__file__).parents[2]
TARGETS = [*FAST, *(pytest.param(target, marks=pytest.mark.slow) for target in SLOW)]
EVERY = pytest.mark.parametrize("target", TARGETS)
# With a softcap a tanh is computed in every sweep, two special functions and two dozen
# instructions: arithmetic limits these on an H100, by this factor at most, and docs/kernels.md says
# so.
SOFTCAP_EXCESS = 2.5

read = cache(readings)


def of(target: str) -> list[Reading]:
    """The sizes of the table."""
    return [r for r in read(target) if r.block != GREEDY.block]


def name(reading: Reading) -> str:
    return f"{reading.case} {reading.block} x {reading.warps} on {reading.target}"


def test_every_kernel_is_compiled() -> None:
    assert {case.kernel for case in cases()} == set(all_kernels())


# Positional arguments of Triton's scans before `reverse`.
SCANS = {"associative_scan": 3, "cumsum": 2, "cumprod": 2}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_no_scan_runs_in_reverse(path: Path) -> None:
    """It is reported wrong on GPUs for steps that do not commute, and right when interpreted."""
    backwards = [
        ast.unparse(call)
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and (name := ast.unparse(call.func).split(".")[-1]) in SCANS
        and (len(call.args) > SCANS[name] or any(k.arg == "reverse" for k in call.keywords))
    ]
    assert not backwards


def test_there_is_one_way_into_a_kernel() -> None:
    """`kernel[grid](...)` stands once: what is done there of strides is done for every argument."""
    launches = [
        f"{path.name}: {ast.unparse(call.func)}"
        for path in sorted((ROOT / "fastppo" / "ops").rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Subscript)
        and ast.unparse(call.func.value).endswith("kernel")
    ]
    assert len(launches) == 1, launches


@EVERY
def test_nothing_spills(target: str) -> None:
    assert [name(r) for r in of(target) if r.spills] == []


@EVERY
def test_logits_are_read_and_written_16_bytes_at_a_time(target: str) -> None:
    rows = [r for r in of(target) if r.bytes_a_logit]
    assert [name(r) for r in rows if not r.wide_loads] == []
    writers = [r for r in rows if r.case.startswith(("policy", "token_logprobs_backward"))]
    assert writers
    assert [name(r) for r in writers if not r.wide_stores] == []


@EVERY
def test_every_load_of_logits_has_an_eviction_hint(target: str) -> None:
    assert [name(r) for r in of(target) if r.bytes_a_logit and not r.hints] == []


@EVERY
def test_two_programs_fit_a_multiprocessor(target: str) -> None:
    over = [r for r in of(target) if r.registers > most_registers(r.warps)]
    # A compute unit of gfx942 has 512 vector registers a lane for each of four waves.
    assert [name(r) for r in over if not target.startswith("gfx")] == []


def test_memory_and_not_arithmetic_limits_an_h100() -> None:
    counted = [r for r in of("sm_90") if r.bytes_a_logit]
    assert all(r.instructions > 5 and r.specials >= 1 for r in counted), "loops were not found"
    for r in counted:
        most, special = limits(r.bytes_a_logit)
        slack = SOFTCAP_EXCESS if r.softcap else 1.0
        assert r.instructions <= slack * most, name(r)
        assert r.specials <= slack * special, name(r)


def test_a_spill_would_be_seen() -> None:
    """The gate can fail: a size far beyond the table's does not fit the registers."""
    (greedy,) = (r for r in read("sm_90") if r.block == GREEDY.block)
    assert greedy.spills > 0


@pytest.mark.skipif(
    f"triton=={version('triton')}" not in (ROOT / "constraints.txt").read_text(),
    reason="docs/kernels.md quotes the code of the pinned triton",
)
@pytest.mark.parametrize("target", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_the_page_shows_the_table(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    shown = table(of(target))
    with capsys.disabled():  # what the gate read is its result, passed or not
        print(f"\n{target}\n{shown}")
    assert shown in page, f"docs/kernels.md: paste the table of {target} printed here"
