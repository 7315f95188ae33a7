"""Which curves a report draws, from which columns."""

from __future__ import annotations

from typing import NamedTuple

from fastppo.report.charts import Line


class Panel(NamedTuple):
    """A chart: its title, its columns with their labels, and columns whose advice it shows."""

    title: str
    columns: dict[str, str]
    advice: tuple[str, ...] = ()
    band: str | None = None  # the column that says how far the first line spreads
    dashed: tuple[str, ...] = ()


PPO = (
    Panel(
        "score (mean, ± one standard deviation)",
        {"score": "score"},
        ("score", "score_length_corr"),
        band="score_std",
    ),
    Panel(
        "KL to the reference (nats a response)",
        {"kl": "KL", "kl_target": "target"},
        ("kl",),
        dashed=("kl_target",),
    ),
    Panel("KL coefficient (beta)", {"kl_coef": "beta"}, ("kl_coef",)),
    Panel("entropy (nats a token)", {"entropy": "entropy"}, ("entropy",)),
    Panel(
        "clip fraction",
        {"clipfrac": "policy", "value_clipfrac": "value"},
        ("clipfrac", "value_clipfrac"),
    ),
    Panel("value loss", {"value_loss": "value loss"}),
    Panel(
        "explained variance",
        {"explained_variance": "explained variance"},
        ("explained_variance",),
    ),
    Panel(
        "response length (tokens)", {"response_length": "mean", "response_length_max": "longest"}
    ),
    Panel("share that ended by themselves", {"eos_share": "EOS"}, ("eos_share",)),
    Panel("PTX loss", {"ptx_loss": "PTX loss"}, ("ptx_loss",)),
    Panel("truncated importance weight", {"rollout_is_mean": "mean"}, ("rollout_is_mean",)),
    Panel("learning rate", {"learning_rate": "actor", "critic_learning_rate": "critic"}),
    Panel(
        "seconds a step, by phase",
        {
            "seconds": "whole step",
            "seconds_rollout": "rollout",
            "seconds_score": "score",
            "seconds_advantage": "advantage",
            "seconds_update": "update",
        },
    ),
)
RM = (
    Panel("loss", {"loss": "training", "eval_loss": "held-out pairs"}),
    Panel("accuracy on held-out pairs", {"eval_accuracy": "accuracy"}),
    Panel("mean margin on held-out pairs", {"eval_margin": "margin"}),
    Panel("learning rate", {"learning_rate": "learning rate", "lr": "learning rate"}),
    Panel("gradient norm", {"grad_norm": "gradient norm"}),
)


def lines(panel: Panel, rows: list[dict[str, float]]) -> list[Line]:
    """The lines of a panel that the rows have values for."""
    found = []
    columns = dict(panel.columns)
    if panel.band is not None:  # the score's panel: several rewards have a line each
        names = sorted({name for row in rows for name in row if name.startswith("reward/")})
        columns |= {name: name.removeprefix("reward/") for name in names}
    for name, label in columns.items():
        with_it = [row for row in rows if name in row and "step" in row]
        if not with_it:
            continue
        band = None
        if panel.band is not None and name == "score" and all(panel.band in r for r in with_it):
            band = [row[panel.band] for row in with_it]
        steps = [row["step"] for row in with_it]
        values = [row[name] for row in with_it]
        found.append(Line(label, steps, values, band, name in panel.dashed))
    return found
