"""The numbers of docs/benchmarks.md, and those that the README picks, are the committed results."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import integrations

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_the_table_of_seeds_is_the_committed_result():
    result = json.loads((ROOT / "benchmarks" / "results" / "demo_seeds.json").read_text())
    rows = []
    for run in result["runs"]:
        cells = [
            f"{run['judge_before']:+.2f}",
            f"{run['judge_after']:+.2f}",
            f"{run['reward_before']:+.2f}",
            f"{run['reward_after']:+.2f}",
            f"{run['kl']:.1f}",
            f"{run['length_before']:.0f}",
            f"{run['length_after']:.0f}",
        ]
        rows.append(f"| {run['seed']} | " + " | ".join(cells) + " |")
    for row in rows:
        assert row in PAGE
    assert result["machine"] in PAGE
    assert result["date"] in PAGE
    before, after = (
        statistics.mean(run[f"judge_{when}"] for run in result["runs"])
        for when in ("before", "after")
    )
    assert f"before and after | {before:.2f}, {after:.2f} | |" in README
    assert f"the demo: {result['date']}" in README


def results(name: str) -> dict[tuple[str, ...], dict[str, Any]]:
    """Rows of a committed table by what they are of; it must be of a day that the page gives."""
    found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert found["date"] in PAGE
    names = ("op", "shape", "case", "dtype", "setting", "what")
    return {tuple(row[x] for x in names if x in row): row for row in found["rows"]}


def ms(row: dict[str, Any]) -> str:
    return f"{row['ms']:.1f}" if row["ms"] < 99.95 else f"{row['ms']:.0f}"


def cell(row: dict[str, Any]) -> str:
    return f"{ms(row)}, {row['peak_bytes'] / 2**20:.0f}"


def operator_rows() -> Iterator[str]:
    rows = results("ops-amd-epyc-2-cores")
    for n, vocab in ((512, 49152), (256, 151936)):
        for dtype in ("float32", "bfloat16"):
            of = {
                key[-1]: row
                for key, row in rows.items()
                if key[:3] == ("policy_loss", f"N {n}, V {vocab}", dtype)
            }
            ours, first = of["fastppo native"], of["fastppo native, nothing kept"]
            others = [of[x] for x in ("fastppo native, in place", "torch.compile", "eager")]
            cells = [f"{ms(ours)} ({ms(first)}), {ours['peak_bytes'] / 2**20:.0f}"]
            cells += [*map(cell, others), ms(of["copy, given buffer"])]
            yield f"| {n} x {vocab}, {dtype} | " + " | ".join(cells) + " |"


def linear_rows() -> Iterator[str]:
    rows = results("linear-amd-epyc-2-cores")
    for n, d, vocab in ((512, 576, 49152), (256, 896, 151936)):
        for head in ("frozen", "trained"):
            of = {
                key[-1].split(" ")[0]: row
                for key, row in rows.items()
                if key[:2] == (f"N {n}, D {d}, V {vocab}", f"{head} head")
                and key[-1] not in ("fastppo torch", "fastppo triton")
            }
            bare = of["2"] if head == "frozen" else of["3"]
            names = ("cut-cross-entropy", "torch.compile", "liger-kernel", "verl", "eager")
            cells = [cell(of["fastppo"]), ms(bare), *(cell(of[name]) for name in names)]
            yield f"| {n}, {d}, {vocab}; {head} | " + " | ".join(cells) + " |"


def test_only_a_lead_outside_the_spread_is_called_one():
    """A tie is where the rounds of two contenders overlap; the page says which are."""
    ties: dict[str, list[bool]] = {}
    for n, d, vocab in ((512, 576, 49152), (256, 896, 151936)):
        for head in ("frozen", "trained"):
            of = {
                key[-1].split(" ")[0]: row
                for key, row in results("linear-amd-epyc-2-cores").items()
                if key[:2] == (f"N {n}, D {d}, V {vocab}", f"{head} head")
                and key[-1] not in ("fastppo torch", "fastppo triton")
            }
            ours = of.pop("fastppo")
            for name, row in of.items():
                tie = row["min_ms"] <= ours["max_ms"] and ours["min_ms"] <= row["max_ms"]
                assert tie or ours["ms"] < row["ms"]
                ties.setdefault("GEMMs" if name in "23" else name, []).append(tie)
    always, never = [True] * 4, [False] * 4
    assert ties == {
        "GEMMs": always,
        "cut-cross-entropy": always,
        "torch.compile": always,
        "eager": [False, True, True, True],
        "liger-kernel": never,
        "verl": never,
    }
    words = " ".join(PAGE.split())
    assert "ties with the bare GEMMs, cut-cross-entropy and `torch.compile` in every row" in words
    assert "It also ties with eager, except in the first row." in words


def test_the_operators_in_which_pytorch_is_ahead_are_named():
    ahead, tied = set(), set()
    cases: dict[tuple[str, ...], dict[str, Any]] = {}
    for key, row in results("ops-amd-epyc-2-cores").items():
        if "error" in row and "ms" in row:
            cases.setdefault(key[:-1], {})[key[-1]] = row
    for case, of in cases.items():
        ours = of["fastppo native"]
        for name in {"eager", "torch.compile"} & set(of):
            ahead |= {(case[0], name)} if of[name]["max_ms"] < ours["min_ms"] else set()
            tied |= {(case[0], name)} if of[name]["min_ms"] <= ours["max_ms"] else set()
    assert {op for op, _ in ahead} == {"token_kl", "whiten", "value_loss"}
    assert ("linear_token_logprobs", "torch.compile") in tied
    assert "PyTorch is ahead in three of the eleven operators" in PAGE


def test_benchmarks_readme_lists_every_result_its_day_and_its_command():
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[\S+\]\(results/(\S+)\) \| (.*) \|$", page, flags=re.MULTILINE))
    files = {path.name: path for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert set(rows) == set(files)
    for name, path in files.items():
        found = json.loads(path.read_text(encoding="utf-8"))
        day, made_by = rows[name].split(" | ")
        assert day == found["date"], name
        assert f"`{found['command']}`" in made_by, name
    seeds = json.loads(files["demo_seeds.json"].read_text(encoding="utf-8"))["runs"]
    assert len(seeds) == 3
    assert "three seeds" in rows["demo_seeds.json"]


def step_rows() -> Iterator[str]:
    rows = results("step")
    llamafactory, trl = "LLaMA-Factory 0.9.5, TRL 0.9.6", "TRL 0.24 PPOTrainer"
    one, all_ = "batch 1 x accumulation 4", "batch 4 x accumulation 1"
    shared, own = "fastppo, critic: shared", "fastppo, critic: adapter"
    for label, critic, setting, what in (
        (
            f"{llamafactory}, prompt by prompt as it comes",
            "on the actor's trunk",
            one,
            llamafactory,
        ),
        ("the same in batches of 4", "on the actor's trunk", all_, llamafactory),
        ("fastppo, `critic: shared` as theirs", "on the actor's trunk", one, shared),
        (f"{trl}, LoRA value model", "of its own", all_, trl),
        ("fastppo, `critic: adapter` as theirs", "of its own", one, own),
    ):
        cells = []
        for again in ("on", "off"):
            case = f"4 prompts, gradient checkpointing {again}: a critic {critic}"
            row = rows[case, setting, what]
            total = statistics.median(each["total"] for each in row["steps"])
            cells.append(f"{total:.1f}, {row['peak_gib']:.2f}")
        yield f"| {label} | " + " | ".join(cells) + " |"


def test_the_line_on_a_7bs_head_is_the_committed_result():
    of = {key[-1]: row for key, row in results("seven_b_head-amd-epyc-2-cores").items()}
    ours, bare, eager = (
        of[x] for x in ("fastppo native", "2 GEMMs, given buffers", "eager, all logits")
    )
    assert round(ours["ms"], -2) == round(bare["ms"], -2)
    (line,) = re.findall(
        r"takes\s(\S+) s on[^;]*and (\S+) MiB above[^;]*; [^;]* is\s+(\S+) s and\s(\S+) MiB", PAGE
    )
    found = [f"{row['ms'] / 1000:.1f}" for row in (ours, eager)]
    memory = [f"{row['peak_bytes'] / 2**20:.0f}" for row in (ours, eager)]
    assert line == (found[0], memory[0], found[1], memory[1])


@pytest.mark.parametrize("table", [operator_rows, linear_rows, step_rows])
def test_the_tables_of_measurements_are_the_committed_results(table):
    rows = list(table())
    assert len(rows) >= 4
    assert [row for row in rows if row not in PAGE] == []


def test_the_readme_picks_its_numbers_from_the_committed_results():
    def step(critic: str, setting: str, what: str) -> str:
        case = f"4 prompts, gradient checkpointing on: a critic {critic}"
        row = results("step")[case, setting, what]
        total = statistics.median(each["total"] for each in row["steps"])
        return f"{total:.1f} s, {row['peak_gib']:.2f} GiB"

    def loss(what: str) -> str:
        row = results("ops-amd-epyc-2-cores")["policy_loss", "N 512, V 49152", "float32", what]
        return f"{ms(row)} ms, {row['peak_bytes'] / 2**20:.0f} MiB"

    def head(what: str) -> tuple[str, str]:
        rows = results("seven_b_head-amd-epyc-2-cores")
        (row,) = (row for key, row in rows.items() if key[-1] == what)
        return f"{row['ms'] / 1000:.1f} s", f"{row['peak_bytes'] / 2**20:.0f} MiB"

    one, all_ = "batch 1 x accumulation 4", "batch 4 x accumulation 1"
    trunk, factory = "on the actor's trunk", "LLaMA-Factory 0.9.5, TRL 0.9.6"
    own = "of its own"
    cells = (
        f"| {step(trunk, one, 'fastppo, critic: shared')} "
        f"| LLaMA-Factory 0.9.5 with TRL 0.9.6: {step(trunk, one, factory)}; "
        f"in batches of 4: {step(trunk, all_, factory)} |",
        f"| {step(own, one, 'fastppo, critic: adapter')} "
        f"| TRL 0.24 PPOTrainer: {step(own, all_, 'TRL 0.24 PPOTrainer')} |",
        f"| {loss('fastppo native')} "
        f"| `torch.compile`: {loss('torch.compile')}; eager: {loss('eager')} |",
        f"| {', '.join(head('fastppo native'))} "
        f"| eager, all logits: {', '.join(head('eager, all logits'))}; "
        f"the two GEMMs alone: {head('2 GEMMs, given buffers')[0]} |",
    )
    assert [row for row in cells if row not in README] == []


def test_the_versions_that_ran_are_those_of_the_result():
    """Who compares wants to know which TRL it was: it is three that the pages speak of."""
    ran = [row for row in results("step").values() if not row["ours"]]
    words = " ".join(PAGE.split())
    assert {row.get("llamafactory", "none") for row in ran} == {"0.9.5", "none"}
    assert {row["trl"] for row in ran} == {"0.9.6", "0.24.0"}
    assert "LLaMA-Factory 0.9.5 with TRL 0.9.6, and TRL 0.24.0 by itself" in words
    (transformers,) = {row["transformers"] for row in ran}
    (peft,) = {row["peft"] for row in ran}
    assert f"transformers {transformers}, peft {peft}" in words


def test_the_table_of_other_trainers_is_the_committed_result():
    """Where it was measured stands above it, and every row's losses were the same both ways."""
    found = json.loads((ROOT / "benchmarks" / "results" / "integrations.json").read_text())
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert found["date"] in page
    assert found["machine"]["cpu"] in page
    assert [row["case"] for row in found["rows"]] == list(integrations.CASES)
    for row in found["rows"]:
        assert integrations.line(row) in page
        assert row["status"] == "timed"
    (trl,) = [row for row in found["rows"] if row["case"] == "trl"]
    assert len(trl["losses"]["ours"]) == 20
