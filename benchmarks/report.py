"""What a run leaves: on which machine, how busy it was, one JSON, and the table of it."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastppo.ops.backend import HAS_TRITON

RESULTS = Path(__file__).parent / "results"
# Of a core. What others take beyond this is no measurement of the contenders alone.
QUIET = 0.1
VECTORS = ("avx512f", "avx2", "avx", "asimd", "neon")


def cpu_info() -> dict[str, str]:
    """Model and flags of the first core, as Linux tells them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines):
        found.setdefault(name.strip(), value.strip())
    return found


def processor() -> str:
    """The CPU by name."""
    return cpu_info().get("model name") or platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    info = cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if HAS_TRITON:
        import triton

        versions["triton"] = triton.__version__
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": next((name for name in VECTORS if name in flags), "unknown"),
        "bf16": bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        **versions,
    }


def slug(found: dict[str, Any]) -> str:
    """A machine's name in file names."""
    name = re.sub(r"[^a-z0-9]+", "-", str(found["cpu"]).lower()).strip("-")
    return f"{name}-{found['cores']}-cores"


class Load:
    """How many cores other processes kept busy during `with` blocks of this, taken together.

    Around the timing alone: the compilers that torch.compile starts are other processes too.
    """

    def __init__(self) -> None:
        self.wall = self.busy = 0.0
        self.known = Path("/proc/stat").exists()

    def __enter__(self) -> None:
        if self.known:
            self.began = self._now()

    def __exit__(self, *_: object) -> None:
        if self.known:
            wall, busy = (b - a for a, b in zip(self.began, self._now(), strict=True))
            self.wall, self.busy = self.wall + wall, self.busy + busy

    @staticmethod
    def _now() -> tuple[float, float]:
        """Wall clock, and busy seconds of all cores but this process's own."""
        line = Path("/proc/stat").read_text(encoding="ascii").split("\n")[0]
        ticks = [int(x) for x in line.split()[1:9]]
        busy = sum(ticks) - ticks[3] - ticks[4]  # all but idle and waiting for a disk
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK") - time.process_time()

    def others(self) -> float | None:
        """Cores; None where the system does not say."""
        return round(max(0.0, self.busy) / self.wall, 2) if self.wall else None


def warning(cores: float | None) -> str | None:
    """What to say of busy cores."""
    if cores is None:
        return "this system does not say how busy other processes are"
    if cores > QUIET:
        return (
            f"other processes kept {cores:.1f} cores busy: these times are no measurement; "
            f"run again on a quiet machine"
        )
    return None


def result(
    name: str,
    rows: Sequence[dict[str, Any]],
    before: Load,
    load: Load,
    notes: Sequence[str],
    arguments: Sequence[str],
) -> dict[str, Any]:
    """The JSON."""
    others = {"before": before.others(), "while_measuring": load.others()}
    said = [text for text in (warning(others["while_measuring"]), *notes) if text]
    return {
        "name": name,
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
        "machine": machine(),
        "cores_busy_with_others": others,
        "notes": said,
        "rows": list(rows),
    }


def cells(row: dict[str, Any], same: Sequence[dict[str, Any]]) -> list[str]:
    """One line of the table; `same` are the rows of its case."""
    if row["status"] != "timed":
        return [row["what"], f"{row['status']}: {row['note']}", "", "", "", "", _error(row)]
    fastest = is_fastest(row, same)
    ms = f"{row['ms']:.4g}"
    return [
        row["what"],
        f"**{ms}**" if fastest else ms,
        f"{row['min_ms']:.4g} to {row['max_ms']:.4g}",
        standing(row, same),
        f"{row['share']:.0%} of {row['bound']}" if "share" in row else "",
        f"{row['peak_bytes'] / 2**20:.2f}",
        _error(row),
    ]


def _error(row: dict[str, Any]) -> str:
    return f"{row['error']:.1e}" if "error" in row else ""


def is_fastest(row: dict[str, Any], same: Sequence[dict[str, Any]]) -> bool:
    """Whether nobody who does the same work is faster, and somebody else does it."""
    if "error" not in row or "ms" not in row:
        return False
    rivals = rivals_of(row, same)
    others = any(not r["ours"] for r in rivals)
    return others and row["ms"] == min(r["ms"] for r in rivals)


def rivals_of(row: dict[str, Any], same: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the case that give the same result as `row`, itself among them; no bounds."""
    work = row.get("rivals", row.get("bound"))
    return [
        r for r in same if "ms" in r and "error" in r and r.get("rivals", r.get("bound")) == work
    ]


def standing(row: dict[str, Any], same: Sequence[dict[str, Any]]) -> str:
    """How a row stands to the smallest median of those that give the same result.

    Where the spreads of the rounds overlap it is a tie, whoever's median is smaller: the row of the
    smallest median leads only if no other spread reaches into its own.
    """
    rivals = rivals_of(row, same) if "error" in row and "ms" in row else []
    if all(r["ours"] for r in rivals):
        return ""
    first = min(rivals, key=lambda r: r["ms"])
    if row is first:
        tied = any(r is not first and r["min_ms"] <= first["max_ms"] for r in rivals)
        return "tie" if tied else "leads"
    return "tie" if row["min_ms"] <= first["max_ms"] else f"{row['ms'] / first['ms']:.2f} x"


def markdown(found: dict[str, Any]) -> str:
    """Every case a table; the smallest median in bold, a bound left out of that."""
    where = found["machine"]
    lines = [
        f"# {found['name']}, {found['date']}",
        "",
        f"{where['cpu']}, {where['cores']} cores, {where['vectors']}, {where['memory_gib']} GiB; "
        f"torch {where['torch']}, {where['threads']} threads; `{found['command']}`. Milliseconds: "
        "median, least and most. Memory: the peak of tensors above the inputs. Error: the largest, "
        "as a share of the oracle's largest entry. Against the first: the median over the smallest "
        "of those that give the same result; a tie where the two spreads overlap.",
        "",
        *(f"- {note}" for note in found["notes"]),
    ]
    fields = ("op", "shape", "dtype", "case")
    title = None
    for row in found["rows"]:
        here = tuple(str(row[name]) for name in fields if name in row)
        if here != title:
            title = here
            same = [r for r in found["rows"] if tuple(str(r[n]) for n in fields if n in r) == here]
            lines += [
                "",
                f"## {', '.join(here)}",
                "",
                "| | ms | spread | against the first | share of a bound | peak MiB | error |",
                "|---|---|---|---|---|---|---|",
            ]
        lines.append("| " + " | ".join(cells(row, same)).replace("\n", " ") + " |")
    return "\n".join(lines) + "\n"


def save(found: dict[str, Any], out: Path | None, keep: bool) -> list[Path]:
    """JSON and table side by side; nothing where a quick run names no file."""
    if out is None and not keep:
        return []
    path = out or RESULTS / f"{found['name']}-{slug(found['machine'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = path.with_suffix(".md")
    table.write_text(markdown(found), encoding="utf-8")
    return [path, table]
