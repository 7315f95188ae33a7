"""The page of `python -m benchmarks step`: a table for each case, made from its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

AS_IT_COMES = "as it comes"  # what a run does whose file says nothing of activations
PHASES = ("generate", "score", "update", "backward")


def optimised(found: Sequence[dict[str, Any]]) -> list[str]:
    """How many parameters each contender's optimiser holds."""
    counts = {
        (r["what"] + (", freeze" if ", freeze" in r["setting"] else ""), r["optimised"])
        for r in found
        if "optimised" in r
    }
    return [f"{what}: the optimiser holds {count:,} parameters" for what, count in sorted(counts)]


def markdown(found: dict[str, Any]) -> str:
    """A table a case; times against ours in the same one."""
    where = found["machine"]
    lines = [
        f"# One PPO step, {found['date']}",
        "",
        f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB; torch "
        f"{where['torch']}, {where['threads']} threads; `{found['command']}`. SmolLM2-135M, "
        "float32, LoRA rank 8 on all linear layers (`freeze`: the last two layers), 64 new tokens "
        "a prompt, 4 epochs. Seconds of a step: median, least and most; the phases are those of "
        "the median step: sampling; forwards without gradient and rewards; backwards; and all "
        "else, which is the update's forwards, losses and the optimiser. Memory is the most that "
        "the process ever had.",
        "",
        *(f"- {note}" for note in found["notes"]),
    ]
    for title in dict.fromkeys(row["case"] for row in found["rows"]):
        same = [row for row in found["rows"] if row["case"] == title]
        timed = [row for row in same if row["ours"] and "seconds" in row]
        ours = next((row["seconds"] for row in timed), None)
        comes = next((r["seconds"] for r in timed if r["setting"].endswith(AS_IT_COMES)), None)
        lines += [
            "",
            f"## {title}",
            "",
            "| | cut | s a step | least to most | sampling | scoring | update, forward | backward "
            "| peak GiB | time / ours | / ours as it comes |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += ["| " + " | ".join(cells(row, ours, comes)) + " |" for row in same]
        lines += [share(row) for row in same if "products" in row]
    return "\n".join(lines) + "\n"


def share(row: dict[str, Any]) -> str:
    """How much of each phase its matrix products alone would take, in one line."""
    alone, phases = row["products"], row["phases"]
    update = phases["update"] + phases["backward"]
    parts = {
        "decoding and prompts": (alone["generate"], phases["generate"]),
        "scoring": (alone["score"], phases["score"]),
        "update": (alone["update"] + alone["backward"], update),
    }
    words = ", ".join(f"{name} {a / b:.0%} of {b:.1f} s" for name, (a, b) in parts.items())
    return (
        f"\nThe matrix products alone ({alone['gflops']:.0f} GFLOP/s; in decoding the weights read "
        f"at {alone['gb_per_second']:.0f} GB/s) take, {row['what']}, {row['setting']}: {words}."
    )


def cells(row: dict[str, Any], ours: float | None, comes: float | None) -> list[str]:
    """One line of a table."""
    if row["status"] != "timed":
        note = row["note"].replace("\n", " ").replace("|", "\\|")
        return [row["what"], row["setting"], f"{row['status']}: {note}", *[""] * 8]
    beside = [
        "" if row["ours"] or own is None else f"{row['seconds'] / own:.2f}" for own in (ours, comes)
    ]
    return [
        row["what"],
        row["setting"],
        f"{row['seconds']:.1f}",
        f"{row['least']:.1f} to {row['most']:.1f}",
        *(f"{row['phases'][name]:.1f}" for name in PHASES),
        f"{row['peak_gib']:.2f}",
        *beside,
    ]
