"""docs/benchmarks.md's step beside other trainers: its table and sentences are of the result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import step, step_page
from tests.static.test_benchmarks_page import PAGE, results

FACTORY, TRL = "LLaMA-Factory 0.9.5, TRL 0.9.6", "TRL 0.24 PPOTrainer"
TRUNK, OWN, UPPER = "a critic on the actor's trunk", "a critic of its own", "the upper layers"
SHARED, ADAPTER = "fastppo, critic: shared", "fastppo, critic: adapter"
# What the page calls a row: prompts, case, batch, contender.
STEPS = {
    f"{FACTORY}, prompt by prompt as it comes": (4, TRUNK, "1 x 4", FACTORY),
    "the same in batches of 4": (4, TRUNK, "4 x 1", FACTORY),
    "fastppo, `critic: shared` as theirs": (4, TRUNK, "1 x 4", SHARED),
    f"{TRL}, LoRA value model": (4, OWN, "4 x 1", TRL),
    "fastppo, `critic: adapter` as theirs": (4, OWN, "1 x 4", ADAPTER),
    f"{FACTORY}, `freeze`": (4, UPPER, "1 x 4, freeze", FACTORY),
    "fastppo, `freeze` as theirs": (4, UPPER, "1 x 4, freeze", SHARED),
    f"fastppo, `lora_layers: {step.UPPER}`": (
        *(4, UPPER, "1 x 4"),
        f"{SHARED}, lora_layers: {step.UPPER}",
    ),
    f"8 prompts: {FACTORY}": (8, TRUNK, "1 x 8", FACTORY),
    "8 prompts: fastppo, `critic: shared`": (8, TRUNK, "1 x 8", SHARED),
    f"8 prompts: {TRL}": (8, OWN, "1 x 8", TRL),
    "8 prompts: fastppo, `critic: adapter`": (8, OWN, "1 x 8", ADAPTER),
}


def step_row(label: str) -> dict[str, Any]:
    prompts, critic, cut, what = STEPS[label]
    batch, _, more = cut.partition(" x ")
    case = f"{prompts} prompts, gradient checkpointing on: {critic}"
    return results("step")[case, f"batch {batch} x accumulation {more}", what]


def step_rows() -> Iterator[str]:
    for label in STEPS:
        row = step_row(label)
        share = f"{update_share(row):.0%}" if "products" in row else ""
        phases = [f"{row['phases'][name]:.1f}" for name in step_page.PHASES]
        cells = [f"{row['seconds']:.1f}", *phases, f"{row['peak_gib']:.2f}", share]
        yield f"| {label} | " + " | ".join(cells) + " |"


def products_of(label: str, *phases: str) -> float:
    """Seconds of the phases' products alone."""
    return sum(step_row(label)["products"][phase] for phase in phases)


def test_how_much_faster_a_step_is_and_what_stands_in_the_way():
    words = " ".join(PAGE.split())
    seconds = {label: step_row(label)["seconds"] for label in STEPS}
    factory, batches, ours, trl, own, frozen, ours_frozen, _, *eight = seconds.values()
    for gain in (factory / ours, eight[0] / eight[1]):
        assert f"1 / {gain:.1f} of LLaMA-Factory's time" in words
    assert f"with `freeze` 1 / {frozen / ours_frozen:.1f}" in words
    assert f"against its batches of 4 it is 1 / {batches / ours:.1f}" in words
    assert (
        f"against TRL 1 / {trl / own:.1f} with 4 prompts and 1 / {eight[2] / eight[3]:.1f}" in words
    )
    bound = products_of("fastppo, `critic: adapter` as theirs", *step_page.PHASES)
    assert f"all products of that step take {bound:.1f} s alone" in words
    row, theirs = (
        step_row(f"{who}, `freeze`{as_}") for who, as_ in (("fastppo", " as theirs"), (FACTORY, ""))
    )
    phases = ("score", "update", "backward")
    mine, other = (sum(r["phases"][name] for name in phases) for r in (row, theirs))
    alone = products_of("fastppo, `freeze` as theirs", *phases)
    assert (
        f"Scoring and update of `freeze` together take {mine:.1f} s against {other:.1f}, and their "
        f"products alone {alone:.1f} s"
    ) in words


def update_share(row: dict[str, Any]) -> float:
    alone, phases = row["products"], row["phases"]
    return (alone["update"] + alone["backward"]) / (phases["update"] + phases["backward"])


def test_the_table_of_steps_is_the_committed_result():
    rows = list(step_rows())
    assert len(rows) == 12
    assert [row for row in rows if row not in PAGE] == []


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
