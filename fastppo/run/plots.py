"""`plot_loss`: one picture a quantity, under the names that LLaMA-Factory gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.run.durable import whole

if TYPE_CHECKING:
    from fastppo.config import Config

SMOOTHING = 0.9  # share of the past in the smoothed line


def total_loss(row: Mapping[str, float], config: Config) -> float:
    """What the optimiser minimised in a step: the policy's loss and the others by their weights."""
    loss = row["policy_loss"] - config.entropy_coef * row["entropy"] + row.get("kl_loss", 0.0)
    loss += config.vf_coef * row.get("value_loss", 0.0)
    return loss + config.ptx_coef * row.get("ptx_loss", 0.0)


def plot_ppo(rows: Sequence[Mapping[str, float]], config: Config, folder: Path) -> list[Path]:
    """training_loss.png and training_reward.png from the metrics' rows."""
    steps = [row["step"] for row in rows]
    return plot(
        {
            "loss": list(zip(steps, (total_loss(row, config) for row in rows), strict=True)),
            "reward": list(zip(steps, (row["score"] for row in rows), strict=True)),
        },
        folder,
    )


def plot_pairs(log_history: Iterable[Mapping[str, Any]], folder: Path) -> list[Path]:
    """training_loss.png, training_eval_loss.png and training_eval_accuracy.png of stage rm."""
    entries = list(log_history)
    return plot(
        {
            name: [(entry["step"], entry[name]) for entry in entries if name in entry]
            for name in ("loss", "eval_loss", "eval_accuracy")
        },
        folder,
    )


def plot(
    series: Mapping[str, Sequence[tuple[float, float]]], folder: Path, prefix: str = "training"
) -> list[Path]:
    """`<prefix>_<name>.png` for each name that has points; the files written."""
    # The Agg figure directly, without pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    for name, points in series.items():
        if not points:
            continue
        steps, values = zip(*points, strict=True)
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
        written.append(folder / f"{prefix}_{name}.png")
        with whole(written[-1]) as place:
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
