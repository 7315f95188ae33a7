"""The static gate: what the machine code of every kernel must not do, on every target."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.static.gate import CANDIDATES, FAST, SLOW, Compiler, Reading, all_kernels, table
from tests.static.gate_cases import GREEDY, candidate_cases, cases
from tests.static.gate_chips import CHIPS, l2_table, limits_table, programs_that_fit

ROOT = Path(__file__).parents[2]
TARGETS = [*FAST, *(pytest.param(target, marks=pytest.mark.slow) for target in SLOW)]
PINNED = pytest.mark.skipif(
    f"triton=={version('triton')}" not in (ROOT / "constraints.txt").read_text(),
    reason="counts and pages are of the pinned Triton's code; another makes other code",
)
EVERY = pytest.mark.parametrize("target", TARGETS)
# What the loops over a row may cost on sm_90, in instructions a logit: a maximum, a multiply-add,
# an exponential and an addition, two more for the entropy; then a multiply-add, an exponential and
# a product, two more for the entropy's gradient; conversions, loads, and a tile's rescaling.
MOST_OF_LOSS = {"heaviest": 17.0, "default": 14.0}

COMPILER = Compiler()
read = cache(COMPILER.readings)


@pytest.fixture(scope="module", autouse=True)
def _compiler_ends() -> Iterator[None]:
    yield
    COMPILER.close()


def of(target: str) -> list[Reading]:
    """The sizes of the table."""
    return [r for r in read(target) if r.variant != GREEDY.variant]


def over_logits(target: str) -> list[Reading]:
    return [r for r in of(target) if r.bytes_a_logit]


def name(reading: Reading) -> str:
    return f"{reading.case} {reading.warps} x {reading.tiles} on {reading.target}"


def test_every_kernel_is_compiled() -> None:
    assert {case.kernel for case in cases()} == set(all_kernels())


def test_the_variants_that_run_by_default_are_compiled() -> None:
    """A call that says nothing has no reference, no importance weights, no entropy's gradient."""
    losses = [case for case in cases() if case.kernel == "policy_loss_kernel"]
    default = [case for case in losses if {"ref_ptr", "importance_ptr"} <= set(case.absent)]
    assert any("dx_ptr" in case.absent for case in default)
    for logits in ("bf16", "fp16", "fp32"):
        aligned = {case.constants["ALIGNED"] for case in default if case.logits == logits}
        assert False in aligned, f"no {logits} of a vocabulary that 16 bytes do not divide"
    assert not any(case.constants["HAS_ENTROPY"] for case in default)


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
    """Of any vocabulary; but a gradient that lies otherwise than its logits is written singly."""
    rows = over_logits(target)
    assert any("odd V" in r.variant for r in rows)
    assert [name(r) for r in rows if not r.wide_loads] == []
    written = {case.name for case in [*cases(), *candidate_cases()] if case.writes}
    writers = [r for r in rows if r.case in written and "apart" not in r.variant]
    assert writers
    assert [name(r) for r in writers if not r.wide_stores] == []


@EVERY
def test_every_load_of_logits_has_an_eviction_hint(target: str) -> None:
    assert [name(r) for r in over_logits(target) if not r.hints] == []


@EVERY
def test_a_program_fits_a_multiprocessor(target: str) -> None:
    if target.startswith("sm_"):
        over = [r for r in of(target) if not programs_that_fit(r.registers, r.warps)]
        assert [name(r) for r in over] == []


@PINNED
def test_a_thread_keeps_three_sums_and_not_a_row_of_them() -> None:
    """So three programs of the model's usual size fit: the number in the table of L2 caches."""
    usual = [r for r in over_logits("sm_90") if r.case.startswith("policy") and r.warps == 8]
    assert usual
    counted = [r for r in usual if "default" in r.variant and "apart" not in r.variant]
    assert counted
    few = [name(r) for r in counted if programs_that_fit(r.registers, 8) < 3]
    assert few == []


@PINNED
@pytest.mark.parametrize("variant", MOST_OF_LOSS)
def test_the_loss_costs_few_instructions_a_logit(variant: str) -> None:
    found = [
        r
        for r in over_logits("sm_90")
        if r.kernel == "policy_loss_kernel" and r.logits == "bf16" and r.variant == variant
    ]
    assert any(r.warps == 8 for r in found)
    for r in found:
        assert r.instructions > 5, "loops were not found"
        if r.tiles > 1:  # a row of a few hundred logits is another matter
            assert r.instructions <= MOST_OF_LOSS[variant], name(r)
        if r.warps == 8 and r.tiles > 1:  # reductions through shared memory and all
            assert r.whole[0] <= MOST_OF_LOSS[variant] + 2, name(r)


@pytest.mark.slow  # every candidate is compiled
def test_a_load_ahead_keeps_the_limit() -> None:
    """What is loaded a tile before it is computed is in no register that is copied from another."""
    ahead = [r for r in over_logits(CANDIDATES) if r.kernel == "policy_loss_kernel"]
    ahead = [r for r in ahead if "ahead" in r.variant]
    assert ahead
    over = [r for r in ahead if r.instructions > MOST_OF_LOSS[r.variant.split(",")[0]]]
    assert [name(r) for r in over] == []


@PINNED
def test_memory_and_not_arithmetic_limits_a_chip() -> None:
    """Loops of every kernel without a softcap, on every chip with an H100's code."""
    counted = [r for r in over_logits("sm_90") if not r.softcap and r.tiles > 1]
    assert all(r.instructions > 3 and r.specials >= 0.9 for r in counted), "loops were not found"
    over = {
        (chip.name, r.case)
        for chip in CHIPS
        for r in counted
        if r.instructions > chip.instructions(r.bytes_a_logit)
        or r.specials > chip.specials(r.bytes_a_logit)
    }
    # Two exponentials and two maxima a pair of 4 bytes: a B200's memory is faster; see the page.
    assert {chip for chip, _ in over} <= {"B200"}
    pairs = ("score_tokens_kernel bf16", "score_tokens_kernel fp16")
    assert all(case.startswith(pairs) for _, case in over), over


def test_a_spill_would_be_seen() -> None:
    """The gate can fail: a size far beyond the table's does not fit the registers."""
    (greedy,) = (r for r in read("sm_90") if r.variant == GREEDY.variant)
    assert greedy.spills > 0


@PINNED
@pytest.mark.parametrize("target", [FAST[0], pytest.param(CANDIDATES, marks=pytest.mark.slow)])
def test_the_page_shows_the_table(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    shown = table(of(target))
    with capsys.disabled():  # what the gate read is its result, passed or not
        print(f"\n{target}\n{shown}")
    assert shown in page, f"docs/kernels.md: paste the table of {target} printed here"


@pytest.mark.parametrize("made", [limits_table, l2_table], ids=lambda f: f.__name__)
def test_the_page_shows_the_model(made: Callable[[], str]) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert made() in page, f"docs/kernels.md: paste this table\n{made()}"
