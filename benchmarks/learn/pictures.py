"""The pictures of docs/learning.md and of the README, from the JSON of the runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.learn import beside_trl, runs, sentiment
from benchmarks.learn.results import Found, of, of_the_way, running
from benchmarks.learn.sentiment_lines import FAR, one_response
from benchmarks.learn.tokens import TASKS

WIDE, HIGH = 3.5, 3.0  # inches of a panel; three of them are as wide as a README
PROXY, GOLD = "tab:blue", "tab:orange"


@contextmanager
def panels(count: int, path: Path) -> Iterator[list[Any]]:
    """Axes beside each other, saved into `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        1, count, figsize=(WIDE * count, HIGH), squeeze=False, layout="constrained"
    )
    yield list(grid[0])
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def band(axis: Any, x: Sequence[float], curves: Sequence[Sequence[float]], label: str) -> None:
    """The mean of several curves, and from the least to the most of them."""
    points = list(zip(*curves, strict=True))
    (line,) = axis.plot(x, [statistics.mean(p) for p in points], label=label)
    axis.fill_between(
        x, [min(p) for p in points], [max(p) for p in points], color=line.get_color(), alpha=0.2
    )


def way(axis: Any, rows: Sequence[Found], task: str) -> None:
    """How far each estimator comes towards the computed optimum of a token task."""
    for name in runs.ESTIMATORS:
        own = of(rows, name=name)
        if own:
            x = [point["samples"] for point in own[0]["curve"]]
            curves = [[of_the_way(row, p["objective"]) for p in row["curve"]] for row in own]
            band(axis, x, curves, name)
    axis.axhline(100, color="black", linewidth=1, linestyle="--")
    axis.set(title=f"{task}: % of the way", xlabel="responses", ylim=(-5, 108))
    axis.locator_params("x", nbins=4)
    axis.legend(loc="lower right", title="-- computed optimum")


def over_kl(axis: Any, rows: Sequence[Found], title: str) -> None:
    """Proxy and gold score over the KL: every rollout as a dot, running means as lines."""
    gold_axis = axis.twinx()
    for row in rows:
        dots, points = row["curve"], running(row)
        for ax, what, color in ((axis, "proxy", PROXY), (gold_axis, "gold", GOLD)):
            ax.scatter(
                [d["kl"] for d in dots], [d[what] for d in dots], s=4, color=color, alpha=0.2
            )
            kl, score = [p.kl for p in points], [getattr(p, what) for p in points]
            ax.plot(kl, score, color=color, marker="o" if len(points) == 1 else None)
    axis.axvline(FAR, color="black", linewidth=0.8, linestyle=":")
    axis.set(title=title, xlabel="KL (nats a response)")
    axis.set_ylabel("reward model (proxy)", color=PROXY)
    gold_axis.set_ylabel("judge (gold)", color=GOLD)


def beside(axis: Any, rows: Sequence[Found]) -> None:
    """The gold score of both trainers' rollouts over samples."""
    for who in beside_trl.TRAINERS:
        own = of(rows, trainer=who)
        if own:
            curves = [running(row) for row in own]
            x = [point.samples for point in curves[0]]
            band(axis, x, [[point.gold for point in curve] for curve in curves], who)
    axis.set(title="judge (gold) of the rollouts", xlabel="responses")
    axis.legend()


def draw_first(found: dict[str, list[Found]], path: Path) -> None:
    """The README's: the token tasks, and gold against proxy where several seeds were run.

    Of one seed, or of a policy that says one thing to every prompt, the curves alone would say too
    much; docs/learning.md has them with the words to it.
    """
    tasks = [task for task in TASKS if of(found["compare"], task=task)]
    name, shown = next(
        (
            (n, own)
            for n in reversed(sentiment.CONTROLLERS)
            if len(own := of(found["sentiment"], name=n)) > 1 and not any(map(one_response, own))
        ),
        ("", []),
    )
    with panels(len(tasks) + bool(shown), path) as axes:
        for axis, task in zip(axes, tasks, strict=False):
            way(axis, of(found["compare"], task=task), task)
        if shown:
            over_kl(axes[-1], shown, f"SmolLM2-135M, {name}")


def draw_controller(found: dict[str, list[Found]], path: Path) -> None:
    """KL over the steps of the controller's runs, mean of the seeds."""
    with panels(2, path) as axes:
        for axis, name in zip(axes, runs.CONTROLLERS, strict=True):
            own = of(found["controller"], name=name)
            for row in own:
                steps = range(1, len(row["kl_by_step"]) + 1)
                axis.plot(steps, row["kl_by_step"], linewidth=0.8, label=f"seed {row['seed']}")
                axis.axhline(row["target"], color="black", linewidth=0.8, linestyle=":")
            axis.set(title=f"KL, {name}", xlabel="step")
            if own:
                axis.legend()


def draw_sentiment(found: dict[str, list[Found]], path: Path) -> None:
    """Gold against proxy over KL, with the controller and without."""
    every = {name: of(found["sentiment"], name=name) for name in sentiment.CONTROLLERS}
    shown = {name: own for name, own in every.items() if own}
    with panels(len(shown), path) as axes:
        for axis, (name, own) in zip(axes, shown.items(), strict=True):
            over_kl(axis, own, name)


def draw_trl(found: dict[str, list[Found]], path: Path) -> None:
    """Gold score of both trainers over samples."""
    with panels(1, path) as axes:
        beside(axes[0], found["trl"])


# File below docs -> the sections of which one must have runs, and what draws it.
PICTURES: dict[str, tuple[str, Callable[[dict[str, list[Found]], Path], None]]] = {
    "learning.png": ("compare", draw_first),
    "learning_controller.png": ("controller", draw_controller),
    "learning_sentiment.png": ("sentiment", draw_sentiment),
    "learning_trl.png": ("trl", draw_trl),
}


def draw(found: dict[str, list[Found]], folder: Path) -> list[Path]:
    """Draw what has runs; returns the files."""
    drawn = []
    for name, (section, function) in PICTURES.items():
        if found[section]:
            function(found, folder / name)
            drawn.append(folder / name)
    return drawn
