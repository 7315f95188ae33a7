"""The JSON of the runs that are there, and what tables and pictures take from them."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.learn import runs

WINDOW = 10  # steps in a running mean: a rollout of a few responses is mostly chance
SURE = 3.0  # standard errors
Found = dict[str, Any]


def read(folder: Path = runs.RESULTS) -> dict[str, list[Found]]:
    """The JSON of every run that is there, by section."""
    by_section: dict[str, list[Found]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        by_section[found["section"]].append(found)
    return by_section


def of(rows: Iterable[Found], **keys: Any) -> list[Found]:
    """Rows with these values, by seed."""
    chosen = [row for row in rows if all(row[k] == v for k, v in keys.items())]
    return sorted(chosen, key=lambda row: row["seed"])


def mean(rows: Sequence[Found], *keys: str) -> float:
    """Mean of an entry over runs."""
    values = []
    for row in rows:
        value: Any = row
        for key in keys:
            value = value[key]
        values.append(value)
    return statistics.mean(values)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def of_the_way(row: Found, objective: float) -> float:
    """Where an objective lies between the start (0) and the optimum (100), in percent."""
    start, best = row["start"]["objective"], row["optimum"]["objective"]
    return 100 * (objective - start) / (best - start)


class Point(NamedTuple):
    """Running means of a run after some step."""

    samples: float
    kl: float
    proxy: float
    gold: float
    gold_error: float  # standard error of that mean, of steps as if they were independent


def running(row: Found) -> list[Point]:
    """Means over WINDOW steps of a run's curve, fewer where it has fewer."""
    curve = row["curve"]
    size = min(WINDOW, len(curve))
    points = []
    for end in range(size, len(curve) + 1):
        part = curve[end - size : end]
        gold = [each["gold"] for each in part]
        error = statistics.stdev(gold) / math.sqrt(size) if size > 1 else math.inf
        means = [statistics.mean(each[key] for each in part) for key in ("kl", "proxy", "gold")]
        points.append(Point(part[-1]["samples"], *means, error))
    return points


def best_gold(row: Found) -> Point:
    """Where the running mean of the gold score is highest."""
    return max(running(row), key=lambda point: point.gold)


def over_optimised(row: Found) -> bool:
    """The gold score ends surely below its best, and the proxy above what it was there."""
    best, end = best_gold(row), running(row)[-1]
    error = math.hypot(best.gold_error, end.gold_error)
    return best.gold - end.gold > SURE * error and end.proxy > best.proxy
