"""Tables and verdicts of docs/learning.md on the demo's task: gold against proxy, and TRL."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.learn import beside_trl, sentiment
from benchmarks.learn.results import (
    SURE,
    WINDOW,
    Found,
    best_gold,
    mean,
    of,
    over_optimised,
    running,
    table,
)

SAME = 1e-3  # of a gold score in [-1, 1]
FAR = 30.0  # nats a response, past which over-optimisation is looked for


def farthest(row: Found) -> float:
    """The highest running mean of a run's KL."""
    return max(point.kl for point in running(row))


def change(row: Found, what: str) -> str:
    """A held-out score before and after, with the standard error of the change."""
    before, after, error = (row[f"{what}_{x}"] for x in ("before", "after", "error"))
    return f"{before:+.2f} to {after:+.2f} (±{error:.2f})"


def sentiment_lines(rows: Sequence[Found]) -> list[str]:
    """A run a line: how far it went, the gold score at its best and at the end."""
    lines = []
    for name in sentiment.CONTROLLERS:
        for row in of(rows, name=name):
            best, end = best_gold(row), running(row)[-1]
            lines.append(
                (
                    name,
                    str(row["seed"]),
                    f"{farthest(row):.1f}",
                    f"{best.gold:+.2f} at KL {best.kl:.1f}, proxy {best.proxy:+.2f}",
                    f"{end.gold:+.2f} at KL {end.kl:.1f}, proxy {end.proxy:+.2f}",
                    change(row, "gold"),
                    change(row, "proxy"),
                    f"{row['seconds'] / 60:.0f}",
                )
            )
    head = ("", "seed", "KL at most", "gold at its best", "gold at the end")
    return table((*head, "gold, held out", "proxy, held out", "minutes"), lines)


def one_response(row: Found) -> bool:
    """The last rollouts' gold scores are the same, and so are their lengths: one text for all."""
    last = row["curve"][-WINDOW:]
    golds, lengths = ([point[key] for point in last] for key in ("gold", "length"))
    return max(golds) - min(golds) < SAME and max(lengths) == min(lengths)


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def who(row: Found) -> str:
    return f"{row['name']}, seed {row['seed']}"


def ends(rows: Sequence[Found]) -> str:
    """What the ends of runs show beside the scores: the controller's beta, and one text for all."""
    said = ""
    if controlled := [row for row in rows if row["settings"].get("adap_kl_ctrl")]:
        betas = listed([f"{row['curve'][-1]['kl_coef']:.2g}" for row in controlled])
        kls = listed([f"{running(row)[-1].kl:.1f}" for row in controlled])
        seeds = listed([str(row["seed"]) for row in controlled])
        said += (
            f" By the end the controller has raised beta to {betas}, and the KL is {kls} there for "
            f"a target of {controlled[0]['settings']['ppo_target']:g} (seed"
            f"{'s' * (len(controlled) > 1)} {seeds})."
        )
    for row in rows:
        last = row["curve"][-1]
        if abs(row["proxy_after"] - row["proxy_before"]) < 2 * row["proxy_error"]:
            rise = row["gold_after"] - row["gold_before"]
            though = ""
            if abs(rise) >= SURE * row["gold_error"]:
                though = f", though its gold score has {'risen' if rise > 0 else 'fallen'}"
            said += (
                f" One run ({who(row)}) has learned nothing: its held-out reward is where it was"
                f"{though}."
            )
        if one_response(row):
            said += (
                f" The last {WINDOW} steps' rollouts all have a gold score of {last['gold']:.2f} "
                f"and {last['length']:.0f} tokens ({who(row)}): the policy says one thing to every "
                "prompt, which neither score counts against it."
            )
    return said


def sentiment_verdict(rows: Sequence[Found]) -> str:
    """Whether over-optimisation was reached, and which runs show it."""
    far = [row for row in rows if farthest(row) > FAR]
    most = max(map(farthest, rows))
    missing = [name for name in sentiment.CONTROLLERS if not of(rows, name=name)]
    left = f" Not run yet: {', '.join(missing)}." if missing else ""
    if not missing and len(rows) == len(sentiment.CONTROLLERS):
        left = " With one seed each, what differs between the two may be chance."
    if not far:
        return (
            f"Over-optimisation was not reached: no run's KL passed {FAR:g} nats a response "
            f"(the most was {most:.1f}).{ends(rows)}{left}"
        )
    shown = [row for row in far if over_optimised(row)]
    names = "; ".join(map(who, far))
    return (
        f"The KL passed {FAR:g} nats a response in {len(far)} of {len(rows)} runs ({names}); in "
        f"{len(shown)} of them the policy is over-optimised, that is, the gold score ended over "
        f"{SURE:g} standard errors below its best, and the proxy above what it was there."
        f"{ends(rows)}{left}"
    )


def sentiment_choices_lines(rows: Sequence[Found], compared: Sequence[Found]) -> list[str]:
    """A setting a line, beside the runs from which each differs in it alone."""
    every = {"as above, controller on": of(compared, name="controller on")}
    every |= {f"`{name}`": of(rows, name=name) for name in sentiment.CHOICES}
    return table(
        ("", "gold, held out, by seed", "gold", "proxy", "KL", "KL at most", "minutes"),
        (
            (
                name,
                ", ".join(f"{row['seed']}: {row['gold_after']:+.2f}" for row in own),
                f"{mean(own, 'gold_after'):+.2f}",
                f"{mean(own, 'proxy_after'):+.2f}",
                f"{mean(own, 'kl'):.1f}",
                f"{max(map(farthest, own)):.1f}",
                f"{mean(own, 'seconds') / 60:.0f}",
            )
            for name, own in every.items()
            if own
        ),
    )


def trl_rates_lines(rows: Sequence[Found]) -> list[str]:
    """Each trainer's held-out gold score at each learning rate."""

    def cell(trainer: str, rate: float) -> str:
        own = of(rows, name=f"{trainer} {rate:g}")
        return ", ".join(f"{row['gold_after']:+.2f}" for row in own)

    return table(
        ("learning rate", *(f"{rate:g}" for rate in beside_trl.RATES)),
        ((who, *(cell(who, rate) for rate in beside_trl.RATES)) for who in beside_trl.TRAINERS),
    )


def trl_lines(rows: Sequence[Found]) -> list[str]:
    """A trainer a line, at equal samples and updates; the untrained model first."""

    def line(who: str, own: Sequence[Found]) -> tuple[str, ...]:
        rates = {f"{row['settings']['learning_rate']:g}" for row in own}
        return (
            who,
            ", ".join(sorted(rates)),
            ", ".join(f"{row['seed']}: {row['gold_after']:+.2f}" for row in own),
            f"{mean(own, 'gold_after'):+.3f}",
            f"{mean(own, 'proxy_after'):+.2f}",
            f"{mean(own, 'kl'):.1f}",
            ", ".join(sorted({f"{row['samples']:,}, {row['updates']:,}" for row in own})),
            f"{mean(own, 'seconds') / 60:.0f}",
        )

    first = [mean(rows, f"{what}_before") for what in ("gold", "proxy")]
    untrained = ("untrained", "", "", f"{first[0]:+.3f}", f"{first[1]:+.2f}", "0.0", "", "")
    head = ("", "learning rate", "gold, by seed", "gold", "proxy", "KL")
    return table(
        (*head, "responses, updates", "minutes a run"),
        [untrained, *(line(w, own) for w in beside_trl.TRAINERS if (own := of(rows, trainer=w)))],
    )


def trl_verdict(rows: Sequence[Found]) -> str:
    """Who is ahead on the gold score, over the seeds that both have."""
    ours, theirs = (
        {row["seed"]: row for row in of(rows, trainer=who)} for who in beside_trl.TRAINERS
    )
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return "No seed has been run by both yet."
    gaps = [ours[seed]["gold_after"] - theirs[seed]["gold_after"] for seed in seeds]
    errors = [row[seed]["gold_error"] for seed in seeds for row in (ours, theirs)]
    error = math.sqrt(sum(x * x for x in errors)) / len(seeds)
    gap = statistics.mean(gaps)
    alike = all(x > 0 for x in gaps) or all(x < 0 for x in gaps)
    few = " With one seed, who is ahead may be chance." if len(seeds) == 1 else ""
    count = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    size = f"{abs(gap):.3f} (standard error over the prompts {error:.3f}, {count})"
    if alike and abs(gap) > 2 * error:
        ahead, other = beside_trl.TRAINERS if gap > 0 else beside_trl.TRAINERS[::-1]
        return f"{ahead} is ahead of {other} on the gold score by {size}.{few}"
    return f"Nobody is surely ahead on the gold score: the means differ by {size}.{few}"
