"""docs/benchmarks.md's step beside other trainers: its table and sentences are of the result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import step, step_page
from tests.static.test_benchmarks_page import PAGE, results

FACTORY, TRL = "LLaMA-Factory 0.9.5, TRL 0.9.6", "TRL 0.24 PPOTrainer"
TRUNK, OWN, UPPER = "a critic on the actor's trunk", "a critic of its own", "the upper layers"
SHARED, ADAPTER = "fastppo, critic: shared", "fastppo, critic: adapter"
LORA = f"{SHARED}, lora_layers: {step.UPPER}"
COMES = step_page.AS_IT_COMES
# What the page calls a row: prompts, checkpointing, case, setting, contender. By default
# LLaMA-Factory recomputes activations, TRL's PPOTrainer keeps them, and so does fastppo here.
STEPS = {
    f"{FACTORY}, prompt by prompt": (4, "on", TRUNK, "1 x 4", FACTORY),
    "the same in batches of 4": (4, "on", TRUNK, "4 x 1", FACTORY),
    "fastppo, `critic: shared` as theirs": (4, "on", TRUNK, f"1 x 4, {COMES}", SHARED),
    "the same, recomputing as theirs": (4, "on", TRUNK, "1 x 4", SHARED),
    f"{FACTORY}, nothing recomputed": (4, "off", TRUNK, "1 x 4", FACTORY),
    f"{TRL}, LoRA value model": (4, "off", OWN, "4 x 1", TRL),
    "fastppo, `critic: adapter` as theirs": (4, "off", OWN, "1 x 4", ADAPTER),
    f"{TRL}, recomputing": (4, "on", OWN, "4 x 1", TRL),
    "fastppo, `critic: adapter`, recomputing": (4, "on", OWN, "1 x 4", ADAPTER),
    f"{FACTORY}, `freeze`": (4, "on", UPPER, "1 x 4, freeze", FACTORY),
    "fastppo, `freeze` as theirs": (4, "on", UPPER, f"1 x 4, freeze, {COMES}", SHARED),
    f"fastppo, `lora_layers: {step.UPPER}`": (4, "on", UPPER, f"1 x 4, {COMES}", LORA),
    f"8 prompts: {FACTORY}": (8, "on", TRUNK, "1 x 8", FACTORY),
    "8 prompts: fastppo, `critic: shared`": (8, "on", TRUNK, f"1 x 8, {COMES}", SHARED),
    "8 prompts: the same, recomputing": (8, "on", TRUNK, "1 x 8", SHARED),
    f"8 prompts: {TRL}": (8, "off", OWN, "1 x 8", TRL),
    "8 prompts: fastppo, `critic: adapter`": (8, "off", OWN, "1 x 8", ADAPTER),
}


def step_row(label: str) -> dict[str, Any]:
    prompts, checkpointing, critic, cut, what = STEPS[label]
    batch, _, more = cut.partition(" x ")
    case = f"{prompts} prompts, gradient checkpointing {checkpointing}: {critic}"
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


def sentences() -> Iterator[str]:
    """What the page says of the table."""
    seconds = {label: step_row(label)["seconds"] for label in STEPS}

    def gain(theirs: str, ours: str) -> str:
        return f"1 / {seconds[theirs] / seconds[ours]:.1f}"

    ours, adapter = "fastppo, `critic: shared` as theirs", "fastppo, `critic: adapter` as theirs"
    again, frozen = "the same, recomputing as theirs", "fastppo, `freeze` as theirs"
    four, eight = f"{FACTORY}, prompt by prompt", f"8 prompts: {FACTORY}"
    yield (
        f"As they come, a step takes {gain(four, ours)} of LLaMA-Factory's time with 4 prompts and "
        f"{gain(eight, '8 prompts: fastppo, `critic: shared`')} with 8"
    )
    yield (
        f"If both recompute it is {gain(four, again)} and "
        f"{gain(eight, '8 prompts: the same, recomputing')}, and if neither does, "
        f"{gain(f'{FACTORY}, nothing recomputed', ours)} with 4"
    )
    yield f"against its batches of 4 it is {gain('the same in batches of 4', ours)}"
    yield f"With `freeze` it is {gain(f'{FACTORY}, `freeze`', frozen)}"
    yield (
        f"TRL's PPOTrainer recomputes nothing as it comes: against it a step takes "
        f"{gain(f'{TRL}, LoRA value model', adapter)} of the time with 4 prompts and "
        f"{gain(f'8 prompts: {TRL}', '8 prompts: fastppo, `critic: adapter`')} with 8"
    )
    bound = products_of(adapter, *step_page.PHASES)
    yield f"all products of that step take {bound:.1f} s alone"
    yield f"twice TRL's speed would be {seconds[f'{TRL}, LoRA value model'] / 2:.1f} s"
    phases = ("score", "update", "backward")
    mine, other = (
        sum(step_row(label)["phases"][name] for name in phases)
        for label in (frozen, f"{FACTORY}, `freeze`")
    )
    yield (
        f"Scoring and update of `freeze` together take {mine:.1f} s against {other:.1f}, and their "
        f"products alone {products_of(frozen, *phases):.1f} s"
    )


def test_how_much_faster_a_step_is_and_what_stands_in_the_way():
    words = " ".join(PAGE.split())
    assert [said for said in sentences() if said not in words] == []


def update_share(row: dict[str, Any]) -> float:
    alone, phases = row["products"], row["phases"]
    return (alone["update"] + alone["backward"]) / (phases["update"] + phases["backward"])


def test_the_table_of_steps_is_the_committed_result():
    rows = list(step_rows())
    assert len(rows) == len(STEPS) == 17
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
