"""The pictures of a run: its curves on one page, and with `plot_loss` LLaMA-Factory's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.run.durable import replace_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.9  # share of the past in the smoothed line


def plot_log(
    log_history: Iterable[Mapping[str, Any]], names: Sequence[str], folder: Path
) -> list[Path]:
    """`training_<name>.png` of each name that some log entry has, against the step.

    Returns:
        The files written.
    """
    # The Agg figure directly, without pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries, written = list(log_history), []
    for name in names:
        steps = [entry["step"] for entry in entries if name in entry]
        values = [entry[name] for entry in entries if name in entry]
        if not steps:
            continue
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        axis.plot(steps, values, color="tab:blue", alpha=0.4, label=name)
        axis.plot(steps, smoothed(values), color="tab:blue", label="smoothed")
        axis.set_xlabel("step")
        axis.set_ylabel(name)
        axis.grid(alpha=0.25)
        axis.legend()
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"training_{name}.png")
        with replace_atomically(written[-1]) as place:
            figure.savefig(place, dpi=100, format="png")
    return written


def smoothed(values: Sequence[float], share: float = SMOOTHING) -> list[float]:
    """Moving average with exponential weights that add up to 1 from the first value on.

    Source: Kingma and Ba 2015, Adam, section 3 (correction of the start's bias).
    """
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = share * average + (1 - share) * value
        weight = share * weight + (1 - share)
        out.append(average / weight)
    return out


def draw_curves(rows: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Eight panels against the PPO step, to read at a glance; no critic leaves one empty."""
    # The Agg figure directly, without pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(2, 4).flatten()
    steps = [row["step"] for row in rows]

    def line(axis: Axes, name: str, label: str | None = None, **style: Any) -> None:
        style = {"marker": "o" if len(steps) < 40 else None, "markersize": 3, **style}
        axis.plot(steps, [row[name] for row in rows], label=label, **style)

    score, kl, beta, entropy, clip, value, length, seconds = axes
    line(score, "score", color="tab:green")
    low = [row["score"] - row["score_std"] for row in rows]
    high = [row["score"] + row["score_std"] for row in rows]
    score.fill_between(steps, low, high, alpha=0.15, color="tab:green", linewidth=0)
    for name in sorted({name for row in rows for name in row if name.startswith("reward/")}):
        values = [row.get(name, float("nan")) for row in rows]
        score.plot(steps, values, linestyle=":", label=name.removeprefix("reward/"))
        score.legend(fontsize=8)
    score.set_title("score (mean, ± one standard deviation)")

    line(kl, "kl", "KL", color="tab:blue")
    line(kl, "kl_target", "target", color="grey", linestyle="--", marker=None)
    kl.legend(fontsize=8)
    kl.set_title("KL to the reference (nats a response)")

    line(beta, "kl_coef", color="tab:blue")
    beta.set_title("KL coefficient")

    line(entropy, "entropy", color="tab:purple")
    entropy.set_title("entropy (nats a token)")

    line(clip, "clipfrac", "policy", color="tab:orange")
    if "value_loss" in rows[0]:
        line(clip, "value_clipfrac", "value", color="tab:red")
    clip.legend(fontsize=8)
    clip.set_title("clip fraction")

    if "value_loss" in rows[0]:
        line(value, "value_loss", "value loss", color="tab:red")
        value.set_title("value loss, explained variance")
        twin = value.twinx()
        line(twin, "explained_variance", "explained variance", color="tab:cyan")
        twin.set_ylim(-1.05, 1.05)
        lines = [*value.get_lines(), *twin.get_lines()]
        value.legend(lines, [str(entry.get_label()) for entry in lines], fontsize=8)
    else:
        value.set_visible(False)

    line(length, "response_length", color="tab:brown")
    length.set_title("response length (tokens)")

    names = ("rollout", "score", "advantage", "update")
    seconds.stackplot(
        steps,
        *([row[f"seconds_{name}"] for row in rows] for name in names),
        labels=names,
        alpha=0.8,
    )
    seconds.legend(fontsize=8, loc="lower right")
    seconds.set_title("seconds a step, by phase")

    for axis in axes:
        axis.grid(alpha=0.25)
        axis.set_xlabel("PPO step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=100, format="png")
