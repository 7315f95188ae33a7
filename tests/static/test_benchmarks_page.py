"""The numbers of docs/benchmarks.md, and those that the README picks, are the committed results."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo_seeds, integrations, shared_prompts

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SEEDS_IN_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_the_table_of_seeds_is_the_committed_result():
    result = json.loads((ROOT / "benchmarks" / "results" / "demo_seeds.json").read_text())
    for row in demo_seeds.rows(result):
        assert row in PAGE
    for sentence in demo_seeds.sentences(result):
        assert sentence in " ".join(PAGE.split())
    assert result["machine"] in PAGE
    assert result["date"] in PAGE
    before, after = (
        statistics.mean(run[f"judge_{when}"] for run in result["runs"])
        for when in ("before", "after")
    )
    seeds = SEEDS_IN_WORDS[len(result["runs"])]
    said = f"the demo's judge over {seeds} seeds, before and after | {before:.2f}, {after:.2f} | |"
    assert said in README
    assert f"the demo's seeds, {result['date']}" in README


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


LINEAR = "linear-intel-r-xeon-r-processor-2-cores"
NARROW = "linear-bfloat16-intel-r-xeon-r-processor-2-cores"
MANY_WORDS = "linear-151936-words-intel-r-xeon-r-processor-2-cores"
# The columns of the page's table, each with how its contender's name begins.
PEERS = {
    "`torch.compile`": "torch.compile",
    "cut-cross-entropy": "cut-cross-entropy",
    "Liger": "liger-kernel 0.8.5, chunked",
    "verl": "verl",
    "TRL": "trl",
    "eager": "eager",
}


def linear_case(name: str) -> dict[str, dict[str, Any]]:
    return {key[-1]: row for key, row in results(LINEAR).items() if key[1] == name and "ms" in row}


def linear_rows() -> Iterator[str]:
    for head, gemms in (("frozen", "2"), ("trained", "3")):
        of = linear_case(f"PPO, {head} head")
        ours = [of[f"fastppo native, {x}"] for x in ("linear_policy_loss", "linear_token_logprobs")]
        peers = [next(row for x, row in of.items() if x.startswith(y)) for y in PEERS.values()]
        bare = f"{ms(of[f'{gemms} GEMMs, given buffers'])} ({gemms})"
        yield f"| {head} | " + " | ".join([*map(cell, ours), bare, *map(cell, peers)]) + " |"
    assert f"| {' | '.join(PEERS)} |" in PAGE


def lead(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if theirs["min_ms"] > ours["max_ms"]:
        return "ahead"
    return "behind" if ours["min_ms"] > theirs["max_ms"] else "tie"


LOGPROBS = "fastppo native, linear_token_logprobs"


def peers_of(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows that are neither fastppo's nor bare products."""
    return {x: row for x, row in rows.items() if not x.startswith(("fastppo", "2", "3", "4"))}


def cases_of(name: str) -> Iterator[tuple[str, str, dict[str, dict[str, Any]]]]:
    """Loss, head and the timed rows of each case of a result."""
    for loss in ("PPO", "GRPO", "GSPO"):
        for head in ("frozen", "trained"):
            own = f"{loss}, {head} head"
            of = {key[-1]: x for key, x in results(name).items() if key[1] == own and "ms" in x}
            assert of
            yield loss, head, of


def units(row: dict[str, Any], rows: dict[str, dict[str, Any]], products: str) -> float:
    return row["ms"] / rows[f"{products}, given buffers"]["ms"]


def spread(values: Collection[float]) -> str:
    assert len(values) == 3
    return f"{min(values):.2f} to {max(values):.2f}"


def test_who_is_ahead_from_hidden_states_is_what_the_page_says():
    """Only a lead outside the spread of the rounds is one."""
    behind: dict[tuple[str, str], set[str]] = {}
    for loss, head, of in cases_of(LINEAR):
        ours = of[LOGPROBS]
        for name, row in peers_of(of).items():
            assert ours["ms"] < row["ms"]
            assert ours["peak_bytes"] < row["peak_bytes"]
            if lead(ours, row) != "ahead":
                behind.setdefault((head, loss), set()).add(name.split()[0].rstrip(","))
    words = " ".join(PAGE.split())
    assert "its median is below all peers', and so is its memory" in words
    assert behind == {
        ("trained", "GRPO"): {"eager", "torch.compile", "cut-cross-entropy"},
        ("trained", "GSPO"): {"torch.compile", "cut-cross-entropy"},
    }
    assert (
        "the spreads of eager, `torch.compile` and cut-cross-entropy overlap with its own under "
        "GRPO, and those of the last two under GSPO" in words
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            LINEAR,
            "{two} times as long as two bare GEMMs. With a trained head it takes {three} "
            "times as long as three, and {four} times as long as four, which",
        ),
        (
            MANY_WORDS,
            "takes {two} times as long as two GEMMs with a frozen head, and {three} "
            "times as long as three with a trained one ({four} times four)",
        ),
    ],
)
def test_times_in_units_of_bare_products_are_the_committed_results(name, sentence):
    found: dict[str, list[float]] = {}
    for _, head, of in cases_of(name):
        for word, count, own in (
            ("two", 2, "frozen"),
            ("three", 3, "trained"),
            ("four", 4, "trained"),
        ):
            if head == own:
                found.setdefault(word, []).append(units(of[LOGPROBS], of, f"{count} GEMMs"))
    said = {word: spread(values) for word, values in found.items()}
    assert sentence.format(**said) in " ".join(PAGE.split())


def test_the_fused_loss_with_a_trained_head_is_the_committed_result():
    (of,) = (of for loss, head, of in cases_of(LINEAR) if (loss, head) == ("PPO", "trained"))
    fused = units(of["fastppo native, linear_policy_loss"], of, "3 GEMMs")
    words = " ".join(PAGE.split())
    assert f"`linear_policy_loss` takes {fused:.2f} times as long as three." in words


def test_the_memory_of_many_words_is_the_committed_result():
    (of,) = (of for loss, head, of in cases_of(MANY_WORDS) if (loss, head) == ("PPO", "trained"))
    gradient = 151936 * 896 * 4
    beside = round((of[LOGPROBS]["peak_bytes"] - gradient) / 2**20)
    words = " ".join(PAGE.split())
    assert f"whose gradient of {gradient / 2**20:.0f} MiB goes into new memory" in words
    assert f"Beside that gradient it takes {beside} MiB." in words


def test_the_paragraph_on_bfloat16_is_the_committed_result():
    found: dict[tuple[str, str], list[float]] = {}
    faster, peaks = [], {}
    for _, head, of in cases_of(NARROW):
        count = "2 GEMMs" if head == "frozen" else "4 GEMMs"
        wide, narrow = (of[f"{LOGPROBS}, {x} logits"] for x in ("float32", "bfloat16"))
        for logits, row in (("float32", wide), ("bfloat16", narrow)):
            share = units(row, of, f"{count}, {logits} logits")
            found.setdefault((head, logits), []).append(share)
            peaks[head, logits] = round(row["peak_bytes"] / 2**20)
        faster.append(wide["ms"] / narrow["ms"])
        peers = peers_of(of)
        assert narrow["ms"] < min(row["ms"] for row in peers.values())
        (cut,) = (row for x, row in peers.items() if x.startswith("cut-cross-entropy"))
        peaks[head, "cut"] = round(cut["peak_bytes"] / 2**20)
    said = {key: spread(values) for key, values in found.items()}
    for sentence in (
        f"takes {said['frozen', 'float32']} times as long as two such GEMMs with a frozen head, "
        f"and {said['trained', 'float32']} times as long as four with a trained one, in "
        f"{peaks['frozen', 'float32']} and {peaks['trained', 'float32']} MiB",
        f"it is {min(faster):.1f} to {max(faster):.1f} times as fast",
        f"takes {peaks['frozen', 'bfloat16']} MiB with a frozen head, as cut-cross-entropy does, "
        f"and {peaks['trained', 'bfloat16']} with a trained one, where that takes "
        f"{peaks['trained', 'cut']}",
        f"that is {said['frozen', 'bfloat16']} times two, and {said['trained', 'bfloat16']} times "
        "four",
    ):
        assert sentence in " ".join(PAGE.split())
    assert peaks["frozen", "bfloat16"] == peaks["frozen", "cut"]
    moved = max(
        row["max_ms"] / row["min_ms"]
        for _, _, of in cases_of(NARROW)
        for x, row in of.items()
        if "bfloat16 logits, given" in x
    )
    assert f"bare ones took up to {moved:.1f} times as long in one round as in another" in " ".join(
        PAGE.split()
    )


def test_tokens_a_second_and_their_ratios_are_the_committed_result():
    found = json.loads(
        (ROOT / "benchmarks/results/rollout-intel-r-xeon-r-processor-2-cores.json").read_text()
    )
    rates: dict[str, dict[str, float]] = {}
    for row in found["rows"]:
        rates.setdefault(row["case"], {})[row["contender"]] = row["tokens_per_second"]
    names = ("fastppo", "generate, merged", "generate", "generate_batch", "vllm")
    for case, of in rates.items():
        assert f"| {case} | " + " | ".join(f"{of[name]:.0f}" for name in names) + " |" in PAGE
    gains = [of["fastppo"] / of["generate, merged"] for of in rates.values()]
    assert f"now {min(gains):.2f} to {max(gains):.2f} times as fast" in " ".join(PAGE.split())
    vllm = [of["vllm"] / of["fastppo"] for of in rates.values()]
    page = " ".join((ROOT / "docs" / "rollouts.md").read_text(encoding="utf-8").split())
    assert f"at {min(vllm):.2f} to {max(vllm):.2f} of the trainer's own speed" in page


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
    assert f"{SEEDS_IN_WORDS[len(seeds)]} seeds" in rows["demo_seeds.json"]


def test_the_page_of_rollouts_has_the_demo_by_both_samplers():
    """Or says that it was not measured, as long as there is no result."""
    page = (ROOT / "docs" / "rollouts.md").read_text(encoding="utf-8")
    result = ROOT / "benchmarks" / "results" / "demo_samplers.json"
    nothing = "This has not been measured yet."
    assert (nothing in page) != result.exists()
    if result.exists():
        said = demo_seeds.markdown(json.loads(result.read_text(encoding="utf-8")))
        assert said == result.with_suffix(".md").read_text(encoding="utf-8")
        assert " ".join(said.split()) in " ".join(page.split())


def test_the_page_of_a_step_has_what_shared_prompts_save():
    (path,) = (ROOT / "benchmarks" / "results").glob("shared_prompts-*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "step.md").read_text(encoding="utf-8")
    for row in shared_prompts.page_rows(found["rows"]):
        assert row in page
    assert found["date"] in page
    assert path.with_suffix(".md").name in page


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


@pytest.mark.parametrize(("table", "count"), [(operator_rows, 4), (linear_rows, 2)])
def test_the_tables_of_measurements_are_the_committed_results(table, count):
    rows = list(table())
    assert len(rows) == count
    assert [row for row in rows if row not in PAGE] == []


def test_the_readme_picks_its_numbers_from_the_committed_results():
    def ppo_step(critic: str, setting: str, what: str, checkpointing: str = "on") -> str:
        case = f"4 prompts, gradient checkpointing {checkpointing}: a critic {critic}"
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
        f"| {ppo_step(trunk, f'{one}, as it comes', 'fastppo, critic: shared')} "
        f"| LLaMA-Factory 0.9.5 with TRL 0.9.6: {ppo_step(trunk, one, factory)}; "
        f"in batches of 4: {ppo_step(trunk, all_, factory)} |",
        f"| {ppo_step(own, one, 'fastppo, critic: adapter', 'off')} "
        f"| TRL 0.24 PPOTrainer: {ppo_step(own, all_, 'TRL 0.24 PPOTrainer', 'off')} |",
        f"| {loss('fastppo native')} "
        f"| `torch.compile`: {loss('torch.compile')}; eager: {loss('eager')} |",
        f"| {', '.join(head('fastppo native'))} "
        f"| eager, all logits: {', '.join(head('eager, all logits'))}; "
        f"the two GEMMs alone: {head('2 GEMMs, given buffers')[0]} |",
    )
    assert [row for row in cells if row not in README] == []


def test_the_table_of_other_trainers_is_the_committed_result():
    """Where it was measured stands above it, and every row's numbers were the same both ways."""
    found = json.loads((ROOT / "benchmarks" / "results" / "integrations.json").read_text())
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert found["date"] in page
    assert found["machine"]["cpu"] in page
    assert [row["case"] for row in found["rows"]] == list(integrations.CASES)
    for row in found["rows"]:
        assert integrations.line(row) in page
        assert row["status"] == "timed"
    (trl,) = [row for row in found["rows"] if row["case"] == "trl"]
    assert len(trl["compared"]["loss"]["ours"]) == 20
