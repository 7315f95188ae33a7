"""The evaluation of a reward model on held-out pairs: metrics, predictions, the model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastppo.run import card, console, results

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.rm.pairs import Pairs
    from fastppo.rm.trainer import PairTrainer

SCORED_TOKENS = {"eos": "EOS token", "suffix": "last token that the template writes behind EOS"}


def evaluate(trainer: PairTrainer, config: Config, pairs: Pairs, *, finished: bool) -> None:
    """Evaluate the model on `pairs`, if there are any, and write the results into output_dir.

    Args:
        finished: whether a training run has just ended; then its state and model card are also
            written.
    """
    folder, count = Path(config.output_dir), len(pairs)
    evaluated: dict[str, Any] = {}
    if count and (finished or config.do_eval):
        evaluated = trainer.evaluate()
        trainer.save_metrics("eval", evaluated)
    if finished:
        trainer.save_state()
        if trainer.world.main:
            card.write(
                folder,
                config,
                steps=trainer.state.global_step,
                metrics=quality_metrics(evaluated),
                held_out=f"{count} held-out pairs",
                place=SCORED_TOKENS[trainer.record["score_at"]],
            )
        console.console.print(f"  reward model: {folder}")
    if config.do_predict:
        predict(trainer, pairs, folder)


def quality_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation without those about its speed."""
    clocks = ("runtime", "per_second", "preparation_time")
    return {k: v for k, v in metrics.items() if k.startswith("eval_") and not k.endswith(clocks)}


def predict(trainer: PairTrainer, pairs: Pairs, folder: Path) -> None:
    """Write both scores of every pair (`do_predict`), by LLaMA-Factory's names."""
    predicted = trainer.predict(pairs, metric_key_prefix="predict")
    trainer.save_metrics("predict", predicted.metrics)
    path = folder / results.PREDICTIONS
    rows = [
        {"chosen": round(chosen, 6), "rejected": round(rejected, 6)}
        for chosen, rejected in np.asarray(predicted.predictions).tolist()
    ]
    if trainer.world.main:
        results.write_jsonl(path, rows)
    console.console.print(f"  predictions: {path}")
