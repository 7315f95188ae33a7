"""The policy's and the reference's responses: a table for programs, a page for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastppo.run.durable import write_text
from fastppo.run.results import write_jsonl

TABLE, PAGE = "eval_samples.jsonl", "eval_samples.md"
ON_PAGE = 32  # a page is to be read to its end; the table has all
WORDS = {"win": "better than the reference", "tie": "a tie", "loss": "worse than the reference"}


def outcome(policy: float, reference: float) -> str:
    """`win`, `tie` or `loss` of the policy against the reference, by their scores."""
    if policy == reference:
        return "tie"
    return "win" if policy > reference else "loss"


def win_rate(policy: Sequence[float], reference: Sequence[float]) -> float:
    """Share of prompts where the policy's response scores higher; a tie is half a win."""
    points = {"win": 1.0, "tie": 0.5, "loss": 0.0}
    pairs = zip(policy, reference, strict=True)
    return sum(points[outcome(ours, theirs)] for ours, theirs in pairs) / len(policy)


def fenced(text: str) -> str:
    """Put a text into a Markdown fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def signed(value: Any) -> str:
    """Format a number with its sign; anything else unchanged."""
    return f"{value:+.3f}" if isinstance(value, float) else str(value)


def section(number: int, row: Mapping[str, Any]) -> str:
    """The Markdown section of one prompt: both responses, their scores, and the outcome."""
    parts = [f"## {number}. {WORDS[row['outcome']]}", "**Prompt**", fenced(row["prompt"])]
    for name in ("policy", "reference"):
        parts += [f"**{name.capitalize()}**, reward {signed(row[f'reward_{name}'])}"]
        parts += [fenced(row[name])]
    if row.get("label"):
        parts += ["**The record's own answer**", fenced(row["label"])]
    return "\n\n".join(parts)


def page(title: str, metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown page: title, metrics, and the first samples in the order of the data."""
    shown = rows[:ON_PAGE]
    count = f"All {len(rows)}" if len(shown) == len(rows) else f"{len(shown)} of {len(rows)}"
    introduction = (
        "The policy and the reference that its KL holds it to, each with one response to the same "
        "held-out prompts, sampled with the same random numbers and scored by the same reward. "
        f"{count} are below, in the order of the data; `{TABLE}` has all of them as JSON."
    )
    numbers = "\n".join(f"| {name} | {number(value)} |" for name, value in metrics.items())
    table = f"| metric | value |\n|---|---|\n{numbers}"
    sections = [section(i, row) for i, row in enumerate(shown, 1)]
    return "\n\n".join([f"# {title}", introduction, table, *sections]) + "\n"


def number(value: Any) -> str:
    """Format a metric for the page."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(
    folder: Path, title: str, metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write the table and the page of samples into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / TABLE, rows)
    write_text(folder / PAGE, page(title, metrics, rows))
