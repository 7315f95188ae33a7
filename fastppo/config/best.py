"""By which metric the evaluations of stage ppo are compared. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastppo.config.schema import Config


def metrics(config: Config) -> list[str]:
    """The metrics that an evaluation of stage ppo can be compared by; the first is the default."""
    judge = ["judge"] if config.eval_judge is not None else []
    parts = [f"reward/{spec.name}" for spec in config.rewards] if len(config.rewards) > 1 else []
    return [*judge, "reward", "win_rate", *parts]


def best_metric(config: Config) -> str:
    """The metric by its name in eval_results.json: `eval_...`."""
    name = config.metric_for_best_model or metrics(config)[0]
    return f"eval_{name.removeprefix('eval_')}"


def check_best(config: Config) -> None:
    """Check the keys of the best evaluation.

    Raises:
        ValueError: a metric that there is not, or no evaluations to compare.
    """
    if config.load_best_model_at_end and config.stage == "rm":
        raise ValueError(
            "load_best_model_at_end: is stage ppo's; in stage rm use early_stopping_steps, and "
            "name the checkpoint that you want"
        )
    for name, does in (
        ("early_stopping_steps", "counts"),
        ("load_best_model_at_end", "compares"),
    ):
        if getattr(config, name) and config.eval_strategy == "no":
            raise ValueError(f"{name}: {does} evaluations; set eval_strategy: steps")
    if config.stage == "rm" or config.metric_for_best_model is None:
        return
    known, given = metrics(config), config.metric_for_best_model.removeprefix("eval_")
    if given == "judge" and given not in known:
        raise ValueError("metric_for_best_model: judge is eval_judge's score; set eval_judge")
    if given not in known:
        raise ValueError(
            f"metric_for_best_model: '{given}' is none of {', '.join(known)}; choose one of them"
        )
