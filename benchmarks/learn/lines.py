"""Tables and verdicts of docs/learning.md on the token tasks and on problems."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.learn import runs
from benchmarks.learn.problems import ESTIMATORS, QUALIFIES
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
    """Exact match on held-out problems, with intervals; the baselines without a model first."""

    def cell(row: Found, when: str) -> str:
        low, high = (100 * edge for edge in row[f"interval_{when}"])
        return f"{100 * row[f'accuracy_{when}']:.1f} ({low:.1f} to {high:.1f})"

    def line(name: str, row: Found, when: str) -> tuple[str, ...]:
        trained = when == "after"
        return (
            name,
            str(row["seed"]),
            cell(row, when),
            f"{100 * row[f'numbers_{when}']:.1f}",
            f"{row['kl']:.2f}" if trained else "",
            f"{row['samples']:,}" if trained else "",
            f"{row['seconds'] / 60:.0f}" if trained else "",
        )

    lines = [
        (name, "", f"{100 * mean(rows, f'accuracy_by_{key}'):.1f}", "100", "", "", "")
        for name, key in (("drawn answer", "chance"), ("commonest answer", "constant"))
    ]
    for seed in sorted({row["seed"] for row in rows}):
        own = sorted(of(rows, seed=seed), key=lambda row: row["name"] != "PPO")
        lines.append(line("untrained", own[0], "before"))
        lines += [line(row["name"], row, "after") for row in own]
    head = ("", "seed", "exact match, %", "a number, %", "KL", "responses", "minutes")
    return table(head, lines)


def learned(row: Found) -> bool:
    """Exact match is surely above the untrained model's and the commonest answer's."""
    low = row["interval_after"][0]
    return bool(low > row["interval_before"][1] and low > row["accuracy_by_constant"])


def problems_verdict(rows: Sequence[Found]) -> str:
    """Whether the task qualifies, and what the trained models surely do better."""
    low, high = QUALIFIES
    start = mean(rows, "accuracy_before")
    does = "qualifies" if low <= start <= high else "does not qualify"
    words = [
        f"The untrained model solves {100 * start:.1f}%, so the task {does}: that takes "
        f"{low:.0%} to {high:.0%}."
    ]
    for name in ESTIMATORS:
        own = of(rows, name=name)
        if not own:
            words.append(f"Not run yet: {name}.")
            continue
        count = sum(map(learned, own))
        before, after = (
            100 * mean(own, f"accuracy_{when}") / mean(own, f"numbers_{when}")
            for when in ("before", "after")
        )
        words.append(
            f"{name} is surely better than the untrained model and than the commonest answer in "
            f"{count} of {len(own)} runs (its interval is above both)."
        )
        if not count:
            words.append("What it has learned is the form: to answer with a number alone.")
        words.append(
            f"Of the responses that are a number {after:.1f}% are right, {before:.1f}% before."
        )
    return " ".join(words)


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
