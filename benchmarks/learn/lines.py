"""Tables and verdicts of docs/learning.md on the token tasks and on problems."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.learn import runs
from benchmarks.learn.results import Found, mean, of, table
from benchmarks.learn.tokens import TASKS

ENOUGH = 0.95  # of the way from the start to the optimum
NEAR = 0.25  # of the controller's target


def shares(rows: Sequence[Found]) -> str:
    """Each seed's share of the way, in percent."""
    return ", ".join(f"{row['seed']}: {100 * row['share']:.1f}" for row in rows)


def compare_lines(rows: Sequence[Found]) -> list[str]:
    """A task a table: the three estimators."""
    lines = []
    for task in TASKS:
        same = of(rows, task=task)
        if not same:
            continue
        first = same[0]
        start, best = first["start"], first["optimum"]
        lines += [
            "",
            f"**{task}.** {' '.join((TASKS[task].reward.__doc__ or '').split())} J is "
            f"{start['objective']:.3f} at the start and {best['objective']:.3f} at the optimum, "
            f"whose reward is {best['reward']:.3f} at a KL of {best['kl']:.2f} nats.",
            "",
            *table(
                ("", "learning rate", "% of the way, by seed", "mean", "reward", "KL"),
                (
                    (
                        name,
                        f"{own[0]['settings']['learning_rate']:g}",
                        shares(own),
                        f"{100 * mean(own, 'share'):.1f}",
                        f"{mean(own, 'end', 'reward'):.3f}",
                        f"{mean(own, 'end', 'kl'):.2f}",
                    )
                    for name in runs.ESTIMATORS
                    if (own := of(same, name=name))
                ),
            ),
        ]
    return lines


def samples_to(own: Sequence[Found], share: float) -> str:
    """Samples after which the mean objective over the seeds first is this share of the way."""
    if not own:
        return ""
    start, best = mean(own, "start", "objective"), mean(own, "optimum", "objective")
    for points in zip(*(row["curve"] for row in own), strict=True):
        objective = statistics.mean(point["objective"] for point in points)
        if objective >= start + share * (best - start):
            return f"{points[0]['samples']:,}"
    return "not reached"


def speed_lines(rows: Sequence[Found]) -> list[str]:
    """Samples that each estimator needs to come half and 95% of the way."""
    return table(
        ("responses to", *(f"{task}, {s:.0%}" for task in TASKS for s in (0.5, 0.9, ENOUGH))),
        (
            (
                name,
                *(
                    samples_to(of(rows, task=task, name=name), s)
                    for task in TASKS
                    for s in (0.5, 0.9, ENOUGH)
                ),
            )
            for name in runs.ESTIMATORS
        ),
    )


def controller_lines(rows: Sequence[Found]) -> list[str]:
    """The controller's runs: KL over the last steps beside the target."""

    def line(name: str, own: Sequence[Found]) -> tuple[str, ...]:
        off = [row["kl_last"] / row["target"] - 1 for row in own]
        return (
            f"`{name}`",
            ", ".join(f"{row['seed']}: {row['kl_last']:.2f}" for row in own),
            ", ".join(f"{100 * x:+.0f}%" for x in off),
            ", ".join(f"{row['kl_coef_by_step'][-1]:.3f}" for row in own),
            f"{sum(abs(x) <= NEAR for x in off)} of {len(off)}",
        )

    return table(
        ("", "KL, by seed", "off the target", "beta at the end", "within 25%"),
        (line(name, own) for name in runs.CONTROLLERS if (own := of(rows, name=name))),
    )


def choices_lines(rows: Sequence[Found], compared: Sequence[Found]) -> list[str]:
    """One setting changed at a time, the best first."""
    base = of(compared, task="alphabet", name="PPO")
    every = {"as in the first table": base} if base else {}
    every |= {f"`{name}`": own for name in runs.CHOICES if (own := of(rows, name=name))}
    ordered = sorted(every.items(), key=lambda item: -mean(item[1], "share"))
    return table(
        ("", "% of the way, by seed", "mean", "seconds a run"),
        (
            (name, shares(own), f"{100 * mean(own, 'share'):.1f}", f"{mean(own, 'seconds'):.0f}")
            for name, own in ordered
        ),
    )


def rates_lines(rows: Sequence[Found]) -> list[str]:
    """Each estimator at each learning rate, on the seed that no other table has."""
    return table(
        ("learning rate", *(f"{rate:g}" for rate in runs.RATES)),
        (
            (
                name,
                *(
                    shares(of(rows, task="alphabet", name=f"{name} {rate:g}"))
                    for rate in runs.RATES
                ),
            )
            for name in runs.ESTIMATORS
        ),
    )


def problems_lines(rows: Sequence[Found]) -> list[str]:
    """Exact match on held-out problems, with intervals."""

    def cell(row: Found, when: str) -> str:
        low, high = row[f"interval_{when}"]
        return f"{100 * row[f'accuracy_{when}']:.1f} ({100 * low:.1f} to {100 * high:.1f})"

    return table(
        ("", "seed", "untrained, %", "trained, %", "by chance, %", "KL", "responses", "minutes"),
        (
            (
                row["name"],
                str(row["seed"]),
                cell(row, "before"),
                cell(row, "after"),
                f"{100 * row['accuracy_by_chance']:.1f}",
                f"{row['kl']:.2f}",
                f"{row['samples']:,}",
                f"{row['seconds'] / 60:.0f}",
            )
            for row in rows
        ),
    )


def verdict(compared: Sequence[Found]) -> str:
    """How many runs of each estimator came near enough."""
    counts = []
    for name in runs.ESTIMATORS:
        own = of(compared, name=name)
        near = sum(row["share"] >= ENOUGH for row in own)
        counts.append(f"{name} in {near} of {len(own)} runs")
    seeds = len({row["seed"] for row in compared})
    few = " With one seed, who is ahead may be chance." if seeds == 1 else ""
    return f"Within 5% of (optimum - start) end {', '.join(counts)}.{few}"
