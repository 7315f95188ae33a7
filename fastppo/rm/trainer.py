"""transformers' loop for stage rm, with checkpoints that are whole or not there, exact to resume.

transformers restores weights, optimiser, schedule, generators and the place in the data; what it
forgets (running sums of the loss, parameters in their own precision) is kept beside that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import EvalPrediction, Trainer, TrainerCallback

from fastppo import seeds
from fastppo.config.rewards import RECORD
from fastppo.errors import TrainingStopped, UserError
from fastppo.models.optim import start_warmup_above_zero
from fastppo.rm.metrics import pair_metrics
from fastppo.rm.model import pair_loss
from fastppo.run import console, durable, plots, save, training_state
from fastppo.run.stopping import Stop

if TYPE_CHECKING:
    from fastppo.run.tracking import Trackers

SUMS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")
PLOTTED = ("loss", "eval_loss", "eval_accuracy")  # with plot_loss, a picture each


class ResumableTrainer(Trainer):
    """A Trainer whose `resume_from_checkpoint` goes on bit for bit; it stops at a signal."""

    def __init__(
        self, *args: Any, stop: Stop, max_bad_steps: int, decisions: dict[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.stop, self.max_bad_steps, self.decisions = stop, max_bad_steps, decisions
        self.bad_run = self.bad_steps = 0  # steps that were skipped: in a row, and in all
        self.place: Path | None = None  # where a checkpoint is being written
        self.resumed: dict[str, Any] | None = None
        self.inputs: dict[str, Tensor] = {}
        self.saved: Path | None = None  # the checkpoint that a resume would go on from
        self.saved_at: int | None = None  # its step, where nothing was evaluated since
        self.marked: dict[str, Any] | None = None  # where the last step ended
        self.trackers: Trackers | None = None
        self.add_callback(Watch(self))

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, whose warm-up begins above 0."""
        first, warmup = self.lr_scheduler is None, self.args.get_warmup_steps(num_training_steps)
        steps = max(num_training_steps, warmup + 1)  # as in make_scheduler
        scheduler = super().create_scheduler(steps, *args, **kwargs)
        if first:
            start_warmup_above_zero(scheduler, warmup)
        return scheduler

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' own; the batch is kept until the next. A signal leaves it at once."""
        self.inputs = inputs
        with self.stop.at_once():
            return super().training_step(model, inputs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, of evaluations and predictions; a signal leaves it at once."""
        with self.stop.at_once():
            return super().evaluation_loop(*args, **kwargs)

    def mark(self, *, evaluated: bool) -> None:
        """Note what the next micro-batch changes: a signal in it goes back to here."""
        sums = {name: getattr(self, name) for name in SUMS}
        self.marked = {
            "evaluated": evaluated,
            "random": seeds.random_state(),
            "sums": {k: x.clone() if isinstance(x, Tensor) else x for k, x in sums.items()},
            "flos": self.current_flos,
            "bad_run": self.bad_run,
        }

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.mark(evaluated=True)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not self.state.global_step or kwargs.get("skip_scheduler"):  # eval_on_start
            return super()._evaluate(*args, **kwargs)
        self.mark(evaluated=False)
        self.saved_at = None
        metrics = super()._evaluate(*args, **kwargs)
        self.mark(evaluated=True)
        return metrics

    def catch_up(self) -> None:
        """The evaluation that a signal had cut off behind the step that this run goes on from."""
        if self.resumed is not None and not self.resumed.pop("evaluated", True):
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self.catch_up()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.catch_up()  # after the last step no generator is read back
        return super()._finalize_training(*args, **kwargs)

    def save_stopped(self) -> Path | None:
        """The checkpoint of the last whole step, after a signal; None where there was none.

        Weights and optimiser are as that step left them: only whole steps change them.
        """
        marked = self.marked
        if marked is None or not self.state.global_step:
            return self.saved
        if self.saved_at == self.state.global_step and not self.args.save_only_model:
            return self.saved
        seeds.set_random_state(marked["random"])
        for name, value in marked["sums"].items():
            setattr(self, name, value)
        self.current_flos, self.bad_run = marked["flos"], marked["bad_run"]
        self.args.save_only_model = False  # or there would be nothing to go on from
        self._save_checkpoint(self.model, None)
        return self.saved

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """transformers' own; the last entry's mean is over the whole run, not since a resume."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.place is None else str(self.place)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(self.args.output_dir)
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        self.place = durable.beside(folder)
        super()._save_checkpoint(model, trial)
        self.state.best_model_checkpoint = None  # it would be the place that is renamed below
        written = self.place / folder.name
        save.note_run(written, self.decisions, self.trackers)
        if not self.args.save_only_model:
            sums = {name: getattr(self, name) for name in SUMS}
            tree = {
                "parameters": self.trainable_parameters(),
                "sums": sums,
                "bad_run": self.bad_run,
            }
            tree["evaluated"] = self.marked is None or self.marked["evaluated"]
            training_state.write(tree, written)
        durable.publish(written, folder)
        self.place.rmdir()
        self.place, self.saved, self.saved_at = None, folder, self.state.global_step
        durable.keep_newest(output_dir, self.args.save_total_limit)

    @torch.no_grad()
    def _load_from_checkpoint(self, folder: str, model: nn.Module | None = None) -> None:
        self.saved = Path(folder)
        self.resumed = training_state.read(self.saved)
        mine, saved = self.trainable_parameters(), self.resumed.get("parameters", {})
        if {name: p.shape for name, p in mine.items()} != {n: p.shape for n, p in saved.items()}:
            raise UserError(
                f"resume_from_checkpoint: {folder}: what trained there has other names or shapes; "
                "keep stage, lora_rank and lora_target as they were"
            )
        for name, parameter in mine.items():
            parameter.copy_(saved[name])


class Watch(TrainerCallback):
    """What a resume restores before the first step; a step whose gradient is not finite."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """transformers has just set its sums to 0."""
        trainer = self.trainer
        if trainer.resumed is not None:
            for name, value in trainer.resumed["sums"].items():
                setattr(trainer, name, value)
            trainer._tr_loss = trainer._tr_loss.to(trainer.args.device)
            trainer.bad_run = trainer.resumed["bad_run"]

    def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Call off a step whose gradient is not finite: without gradients AdamW does nothing."""
        trainer = self.trainer
        own = list(trainer.trainable_parameters().values())
        gradients = [p.grad for p in own if p.grad is not None]
        if nn.utils.get_total_norm(gradients).isfinite():
            trainer.bad_run = 0
            return
        for parameter in own:
            parameter.grad = None
        trainer.bad_run += 1
        trainer.bad_steps += 1
        step = state.global_step + 1
        if trainer.bad_steps == 1:
            console.console.print(
                f"[yellow]warning:[/yellow] guard_nonfinite: the gradient of step {step} is not "
                "finite, and the step was skipped; in many steps lower learning_rate"
            )
        if 0 < trainer.max_bad_steps <= trainer.bad_run:
            path = Path(args.output_dir) / f"bad_batch_step_{step}.safetensors"
            save_file({name: x.cpu().contiguous() for name, x in trainer.inputs.items()}, path)
            raise TrainingStopped(
                f"{trainer.bad_run} steps in a row had a gradient that is not finite "
                f"(max_bad_steps); the last batch is in {path}; the likeliest cause: learning_rate"
            )


class PairTrainer(ResumableTrainer):
    """The loop over pairs; saves what stage ppo, and LLaMA-Factory, load."""

    tokenizer: Any
    record: dict[str, Any]  # where the scores are read, for whoever loads the folder
    in_order = False  # disable_shuffling
    plots = False  # plot_loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.in_order:
            return SequentialSampler(train_dataset or self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """The pairwise loss of a micro-batch."""
        scores = model(**inputs)
        loss = pair_loss(scores)
        return (loss, {"scores": scores}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and chosen and rejected scores side by side (B, 2)."""
        with torch.no_grad():
            scores = model(**self._prepare_inputs(inputs))
        both_B2 = torch.stack(scores.chunk(2), dim=1)
        return pair_loss(scores), both_B2, torch.zeros(len(both_B2))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        save.save_model(self.model.model, self.model.head, self.tokenizer, folder)
        text = json.dumps(self.record, indent=2) + "\n"
        (folder / RECORD).write_text(text, encoding="utf-8")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.draw()

    def draw(self) -> None:
        """`plot_loss`: LLaMA-Factory's pictures of all that was logged so far."""
        if self.plots:
            plots.plot_log(self.state.log_history, PLOTTED, Path(self.args.output_dir))


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, margin and calibration of the scores of pairs (N, 2)."""
    return pair_metrics(prediction.predictions[:, 0], prediction.predictions[:, 1])
