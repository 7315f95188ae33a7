"""What a reward model is worth on held-out pairs: evaluation, predictions, the model card."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback

from fastppo.run import card, console, results

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from fastppo.config import Config
    from fastppo.types import Pair


PLACES = {"eos": "EOS token", "suffix": "last token that the template writes behind EOS"}


class LogFile(TrainerCallback):
    """LLaMA-Factory's trainer_log.jsonl; an evaluation without training has none."""

    began: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the file, or go on with it."""
        self.began = time.monotonic()
        results.begin_log(Path(args.output_dir), state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A line of training or evaluation."""
        if self.began is not None:
            results.log_line(
                Path(args.output_dir),
                state.log_history[-1],
                step=state.global_step,
                total_steps=state.max_steps,
                seconds=time.monotonic() - self.began,
            )


def report(trainer: Trainer, config: Config, pairs: Dataset[Pair], *, trained: bool) -> None:
    """Evaluate the finished model where there are pairs to do it on; files in output_dir."""
    folder, count = Path(config.output_dir), len(pairs)
    evaluated: dict[str, Any] = {}
    if count and (trained or config.do_eval):
        evaluated = trainer.evaluate()
        trainer.save_metrics("eval", evaluated)
    if trained:
        trainer.save_state()
        card.write(
            folder,
            config,
            steps=trainer.state.global_step,
            metrics=pick(evaluated),
            held_out=f"{count} held-out pairs",
            place=PLACES[trainer.record["score_at"]],
        )
        console.console.print(f"  reward model: {folder}")
    if config.do_predict:
        predict(trainer, pairs, folder)


def pick(metrics: dict[str, Any]) -> dict[str, Any]:
    """What of an evaluation says how good the model is, and not how fast it was."""
    clocks = ("runtime", "per_second", "preparation_time")
    return {k: v for k, v in metrics.items() if k.startswith("eval_") and not k.endswith(clocks)}


def predict(trainer: Trainer, pairs: Dataset[Pair], folder: Path) -> None:
    """`do_predict`: both scores of every held-out pair, under LLaMA-Factory's names."""
    predicted = trainer.predict(pairs, metric_key_prefix="predict")
    trainer.save_metrics("predict", predicted.metrics)
    path = folder / results.PREDICTIONS
    rows = [
        {"chosen": round(chosen, 6), "rejected": round(rejected, 6)}
        for chosen, rejected in predicted.predictions.tolist()
    ]
    results.write_jsonl(path, rows)
    console.console.print(f"  predictions: {path}")
