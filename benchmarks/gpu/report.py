"""The tables of a run, drawn from the JSON of its sections; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.runner import DONE
from benchmarks.gpu.sections import SECTIONS

Rows = list[dict[str, Any]]

# From Liger-Kernel's README: its CuTe kernel, bfloat16, H 4096, V 131072. Not measured here.
PUBLISHED = (
    "Liger-Kernel publishes for its own kernel, on an H100 and at these shapes: 3.12 ms for the "
    "log-probs of 2048 tokens (706 TFLOP/s) and 12.25 ms of 8192; 50.4 ms for forward and backward "
    "of 8192 with a trained head, 698 TFLOP/s if four GEMMs are counted and 523 if three, as here."
)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table; None is an empty cell."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = ("" if cell is None else str(cell).replace("|", "/") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""] if rows else []


def number(row: dict[str, Any], key: str, form: str = ".4g") -> str | None:
    """A value of a row, or nothing."""
    return None if row.get(key) is None else format(row[key], form)


def mib(row: dict[str, Any]) -> str | None:
    return None if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:.0f}"


def launch(rows: Rows) -> list[str]:
    lines = [
        f"{name}: {taken} s to import"
        for row in rows
        if row["what"] == "imports"
        for name, taken in row["seconds"].items()
    ]
    found = [row for row in rows if row["what"] != "imports"]
    cells = [
        (r["what"], number(r, "seconds"), number(r, "error", ".1e"), r.get("note")) for r in found
    ]
    head = ("operator", "first call, s", "error", "note")
    return ["; ".join(lines) + ".", "", *table(head, cells)]


def oracle(rows: Rows) -> list[str]:
    counts = {
        outcome: sum(row["outcome"] == outcome for row in rows)
        for outcome in ("passed", "failed", "skipped")
    }
    files: dict[str, int] = {}
    for row in rows:
        if row["outcome"] == "passed":
            stem = row["what"].partition("::")[0]
            files[stem] = files.get(stem, 0) + 1
    text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    lines = [f"{text}; passed of {', '.join(f'{n}: {c}' for n, c in files.items())}.", ""]
    failed = [(row["what"], row["note"]) for row in rows if row["outcome"] == "failed"]
    return lines + table(("failed", "why"), failed)


def logits(rows: Rows) -> list[str]:
    head = (
        "rows x vocabulary",
        "dtype",
        "what",
        "ms by a CUDA graph",
        "share of a copy",
        "ms of a plain call",
        "share",
        "peak MiB above inputs",
        "error",
        "note",
    )
    cells = [
        (
            f"{r['rows']} x {r['vocab']}",
            r["dtype"],
            r["what"],
            number(r, "graph_ms"),
            number(r, "graph_share", ".0%"),
            number(r, "ms"),
            number(r, "share", ".0%"),
            mib(r),
            number(r, "error", ".1e"),
            r.get("note"),
        )
        for r in rows
        if "what" in r
    ]
    sizes = [row for row in rows if "size" in row]
    return [*table(head, cells), *proposal(sizes), *tried(sizes)]


def fastest(sizes: Rows) -> Rows:
    """The fastest size of each kernel, dtype and vocabulary, with the table's time beside it."""
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in sizes:
        if "ms" in row:
            groups.setdefault((row["kernel"], row["dtype"], row["vocab"]), []).append(row)
    found = []
    for group in groups.values():
        best = min(group, key=lambda row: row["ms"])
        own = next((row for row in group if row["in_table"]), None)
        found.append({**best, "table": own})
    return sorted(found, key=lambda row: (row["kernel"], row["dtype"], row["vocab"]))


def proposal(sizes: Rows) -> list[str]:
    """The launch table that these times propose."""
    head = ("kernel", "dtype", "up to vocabulary", "proposed", "ms", "in the table", "ms", "gain")
    cells = []
    for row in fastest(sizes):
        own = row["table"] or {}
        gain = f"{1 - row['ms'] / own['ms']:.0%}" if own else None
        cells.append(
            (
                row["kernel"],
                row["dtype"],
                row["vocab"],
                row["size"],
                number(row, "ms"),
                own.get("size"),
                number(own, "ms"),
                gain,
            )
        )
    lines = table(head, cells)
    return ["The launch table that the times below propose:", "", *lines] if lines else []


def tried(sizes: Rows) -> list[str]:
    head = ("kernel", "dtype", "vocabulary", "size", "ms", "in the table", "note")
    cells = [
        (
            r["kernel"],
            r["dtype"],
            r["vocab"],
            r["size"],
            number(r, "ms"),
            "yes" if r["in_table"] else None,
            r.get("note"),
        )
        for r in sizes
    ]
    return table(head, cells)


def linear(rows: Rows) -> list[str]:
    head = ("tokens", "head", "what", "ms", "TFLOP/s", "peak MiB above inputs", "error", "note")
    cells = [
        (
            r["tokens"],
            r["head"],
            r["what"],
            number(r, "ms"),
            number(r, "tflops", ".0f"),
            mib(r),
            number(r, "error", ".1e"),
            r.get("note"),
        )
        for r in rows
    ]
    text = []
    if rows:
        text = [f"Hidden size {rows[0]['hidden']}, vocabulary {rows[0]['vocab']}, bfloat16.", ""]
    return [*text, *table(head, cells), PUBLISHED, ""]


def trainer(rows: Rows) -> list[str]:
    head = ("way", "phase", "seconds", "peak GiB", "the plan's peak GiB", "note")
    cells = []
    for row in rows:
        for phase, found in row.get("phases", {"": {}}).items():
            values = (number(found, "seconds"), number(found, "peak_gib"))
            cells.append((row["way"], phase, *values, row.get("planned_gib"), row.get("note")))
    lines = table(head, cells)
    if rows:
        first = rows[0]
        text = (
            f"{first['rows']} sequences of {first['length']} tokens, {first['new_tokens']} sampled."
        )
        lines = [text, "", *lines]
    return lines + offloads_cost(rows)


def offloads_cost(rows: Rows) -> list[str]:
    """What moving layers' inputs to the host takes, and what it frees, in an update."""
    updates = {row["way"]: row["phases"].get("update") for row in rows if "phases" in row}
    kept, moved = (updates.get(f"ppo, checkpoint{end}") for end in ("", "+offload"))
    if not kept or not moved:
        return []
    seconds, gib = moved["seconds"] - kept["seconds"], kept["peak_gib"] - moved["peak_gib"]
    return [f"Offloading costs {seconds:.2f} s of an update and frees {gib:.2f} GiB.", ""]


def sampler(rows: Rows) -> list[str]:
    head = (
        "way",
        "call",
        "prompts",
        "prompt's tokens",
        "new tokens",
        "seconds",
        "tokens/s",
        "note",
    )
    keys = ("way", "call", "prompts", "prompt", "new_tokens", "seconds", "rate", "note")
    return table(head, [tuple(row.get(key) for key in keys) for row in rows])


TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "launch": launch,
    "oracle": oracle,
    "logits": logits,
    "linear": linear,
    "trainer": trainer,
    "sampler": sampler,
}


def heading(results: dict[str, dict[str, Any]]) -> list[str]:
    """Device, versions and days; or that nothing here is a measurement."""
    machines = [result["machine"] for result in results.values() if result["machine"]]
    where = machines[0] if machines else {}
    days = sorted({result["date"] for result in results.values()})
    rehearsal = any(result["rehearsal"] for result in results.values())
    device = where.get("device", "unknown device")
    lines = [f"# {'Rehearsal' if rehearsal else device}, {', '.join(days)}", ""]
    if rehearsal:
        lines += [
            f"A rehearsal at toy sizes on a {device}: no number on this page is a measurement.",
            "",
        ]
    facts = [f"{key} {where[key]}" for key in ("torch", "triton", "cuda", "python") if key in where]
    if "memory_gib" in where:
        facts.append(f"{where['memory_gib']} GiB, {where['multiprocessors']} multiprocessors")
        facts.append(f"{where['l2_mib']} MiB of L2, capability {where['capability']}")
    return [*lines, f"{'; '.join(facts)}; by `make gpu`. Times are medians.", ""]


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The page: each section's state, then its tables."""
    lines = heading(results)
    for section in SECTIONS:
        if section.name not in results:
            continue
        result = results[section.name]
        lines += [f"## {section.title}", ""]
        if result["state"] != DONE:
            lines += [f"**{result['state']}**: {result['note']}. What it had by then:", ""]
        lines += TABLES[section.name](result["rows"])
    return "\n".join(lines).rstrip() + "\n"
