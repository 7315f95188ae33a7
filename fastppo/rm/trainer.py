"""transformers' training loop for stage rm, with checkpoints that resume bit for bit.

transformers restores weights, optimiser, schedule, generators and the position in the data. These
checkpoints also have the running sums of the loss and the parameters in their own precision, and
they are written atomically.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.data import Sampler, SequentialSampler
from transformers import EvalPrediction, Trainer

from fastppo import seeds
from fastppo.config.rewards import RECORD
from fastppo.errors import UserError
from fastppo.models.optim import start_warmup_above_zero
from fastppo.rm.callbacks import RestoreSums, SkipNonfiniteSteps
from fastppo.rm.metrics import pair_metrics
from fastppo.rm.model import pair_loss
from fastppo.rm.pairs import part_of
from fastppo.run import durable, plots, save, training_state
from fastppo.run.stopping import Stop
from fastppo.run.world import ALONE, World

if TYPE_CHECKING:
    from fastppo.run.tracking import Trackers
    from fastppo.templates import Template

SUMS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")
PLOTTED = ("loss", "eval_loss", "eval_accuracy")  # the pictures of plot_loss


class ResumableTrainer(Trainer):
    """A Trainer that resumes bit for bit, skips nonfinite steps, and saves and stops at a signal.

    Methods whose names begin with an underscore override transformers' own.
    """

    def __init__(
        self,
        *args: Any,
        stop: Stop,
        max_bad_steps: int,
        decisions: dict[str, Any],
        scaler: GradScaler | None = None,
        world: World = ALONE,
        **kwargs: Any,
    ) -> None:
        self.world = world  # the run's processes, of which transformers knows nothing
        super().__init__(*args, **kwargs)
        # accelerate creates none on a CPU. With this one accelerate scales the loss in backward and
        # skips steps that overflow, and transformers stores its state in checkpoints.
        self.accelerator.scaler = scaler
        self.overflow_steps = 0  # steps skipped only because of the scale
        self.finite_loss = True  # of the micro-batches since the last step
        self.stop, self.max_bad_steps, self.decisions = stop, max_bad_steps, decisions
        self.loss_scale = 1.0  # the scale of the last gradients
        self.bad_run = self.bad_steps = 0  # skipped steps: in a row, and in total
        self.place: Path | None = None  # folder into which a checkpoint is being written
        self.resumed: dict[str, Any] | None = None
        self.inputs: dict[str, Tensor] = {}
        self.saved: Path | None = None  # the last checkpoint
        self.saved_at: int | None = None  # its step; None if there was an evaluation after it
        self.step_end: dict[str, Any] | None = None  # state to restore if a signal interrupts
        self.trackers: Trackers | None = None
        self.add_callback(RestoreSums(self))
        self.add_callback(SkipNonfiniteSteps(self))

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """transformers' schedule, except that the warm-up starts above 0."""
        first, warmup = self.lr_scheduler is None, self.args.get_warmup_steps(num_training_steps)
        steps = max(num_training_steps, warmup + 1)  # as in make_scheduler
        scheduler = super().create_scheduler(steps, *args, **kwargs)
        if first:
            start_warmup_above_zero(scheduler, warmup)
        return scheduler

    def is_world_process_zero(self) -> bool:
        """Whether this process writes transformers' files of metrics and state."""
        return self.world.main

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' step, which a signal may interrupt; the loss is that of all processes."""
        self.inputs = inputs
        with self.stop.at_once():
            loss = self.world.sum(self.own_step(model, inputs, *args, **kwargs))
        self.finite_loss = self.finite_loss and bool(loss.isfinite())
        return loss

    def own_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' step with this process's part of the micro-batch."""
        return super().training_step(model, inputs, *args, **kwargs)

    def unscale_gradients(self) -> float:
        """Add up all processes' gradients, and divide them by the loss scale, before clipping.

        Returns:
            The loss scale, 1 if there is none.
        """
        with self.stop.at_once():
            self.world.sum_gradients(list(self.trainable_parameters().values()))
        scaler = self.accelerator.scaler
        if scaler is None:
            return 1.0
        scaler.unscale_(self.optimizer.optimizer)
        return float(scaler.get_scale())

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None:  # it is None if only the checkpoint's run had fp16
            super()._load_scaler(checkpoint)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.loss_scale = self.unscale_gradients()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # max_grad_norm: 0, nothing was clipped
            self.loss_scale = self.unscale_gradients()
        return super()._get_grad_norm(model, grad_norm)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' evaluation or prediction, which a signal may interrupt."""
        with self.stop.at_once():
            return super().evaluation_loop(*args, **kwargs)

    def record_step_end(self, *, evaluated: bool) -> None:
        """Copy the state that the next micro-batch changes, to restore it after a signal."""
        sums = {name: getattr(self, name) for name in SUMS}
        self.step_end = {
            "evaluated": evaluated,
            "random": seeds.random_state(),
            "sums": {k: x.clone() if isinstance(x, Tensor) else x for k, x in sums.items()},
            "flos": self.current_flos,
            "bad_run": self.bad_run,
        }

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.record_step_end(evaluated=True)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not self.state.global_step or kwargs.get("skip_scheduler"):  # eval_on_start
            return super()._evaluate(*args, **kwargs)
        self.record_step_end(evaluated=False)
        self.saved_at = None
        metrics = super()._evaluate(*args, **kwargs)
        self.record_step_end(evaluated=True)
        return metrics

    def evaluate_if_interrupted(self) -> None:
        """Run the evaluation after the resumed checkpoint's step, if a signal interrupted it."""
        if self.resumed is not None and not self.resumed.pop("evaluated", True):
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self.evaluate_if_interrupted()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.evaluate_if_interrupted()  # after the last step no generator state is loaded
        return super()._finalize_training(*args, **kwargs)

    def save_last_step(self) -> Path | None:
        """Save the last complete step after a signal; returns its folder, or None without a step.

        Weights and optimiser are as after that step, because only a complete step changes them. No
        process asks another: the first alone saves.
        """
        end = self.step_end
        if end is None or not self.state.global_step or not self.world.main:
            return self.saved
        if self.saved_at == self.state.global_step and not self.args.save_only_model:
            return self.saved
        seeds.set_random_state(end["random"])
        for name, value in end["sums"].items():
            setattr(self, name, value)
        self.current_flos, self.bad_run = end["flos"], end["bad_run"]
        self.args.save_only_model = False  # otherwise the run could not be resumed
        self.note_saved(self.write_checkpoint(self.model, None))
        return self.saved

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """transformers' log, but the final mean loss is over the whole run, even after a resume."""
        if self.accelerator.scaler is not None and "loss" in logs:
            logs["overflow_steps"] = self.overflow_steps
            logs["loss_scale"] = self.accelerator.scaler.get_scale()
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.place is None else str(self.place)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.world.on_main(self.write_checkpoint, model, trial)
        self.note_saved(folder)
        self.world.report_checkpoint(folder)

    def note_saved(self, folder: Path) -> None:
        """Note the checkpoint of this step."""
        self.place, self.saved, self.saved_at = None, folder, self.state.global_step

    def write_checkpoint(self, model: nn.Module, trial: Any) -> Path:
        """Write `checkpoint-N`, completely or not at all; returns its folder."""
        output_dir = Path(self.args.output_dir)
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        self.place = durable.partial_folder(folder)
        super()._save_checkpoint(model, trial)
        self.state.best_model_checkpoint = None  # it would name the folder that is renamed below
        written = self.place / folder.name
        identity = durable.identity_of(output_dir)
        save.note_run(written, self.decisions, self.trackers, identity)
        if not self.args.save_only_model:
            sums = {name: getattr(self, name) for name in SUMS}
            tree = {
                "parameters": self.trainable_parameters(),
                "sums": sums,
                "bad_run": self.bad_run,
                "overflow_steps": self.overflow_steps,
            }
            tree["evaluated"] = self.step_end is None or self.step_end["evaluated"]
            training_state.write(tree, written)
        durable.publish(written, folder)
        self.place.rmdir()
        durable.keep_newest(output_dir, self.args.save_total_limit)
        return folder

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


class PairTrainer(ResumableTrainer):
    """The loop over pairs; stage ppo and LLaMA-Factory can load the folders that it saves."""

    tokenizer: Any
    template: Template
    record: dict[str, Any]  # saved with the model: the token that is scored, among other facts
    step_pairs = 0  # pairs of the optimiser step
    micro_batch = 0  # number of the micro-batch in it
    in_order = False  # disable_shuffling
    plots = False  # plot_loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.in_order:
            return SequentialSampler(train_dataset or self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' micro-batches of an optimiser step; their pairs are counted."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.step_pairs = sum(len(inputs["input_ids"]) // 2 for inputs in batches)
        self.micro_batch = 0
        return batches, items

    def own_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' step with this process's part of the micro-batch, possibly none.

        Of several processes each seeds dropout first, as a checkpoint has the state of one.
        """
        if self.world.size == 1:
            return super().own_step(model, inputs, *args, **kwargs)
        part, device = self.world.part(len(inputs["input_ids"]) // 2), self.args.device
        self.micro_batch += 1
        if not part:
            return torch.zeros((), device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            place = (self.state.global_step, self.micro_batch, part.start)
            torch.manual_seed(seeds.seed_of(self.args.seed, "dropout", *place))
            return super().own_step(model, part_of(inputs, part), *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """The pairwise loss of a micro-batch, or of this process's part of it."""
        scores = model(**inputs)
        loss = pair_loss(scores)
        if self.world.size > 1:  # so that the sum over the processes is the mean over the step
            share = len(scores) / 2 / self.step_pairs
            loss = loss * (share * self.current_gradient_accumulation_steps)
        return (loss, {"scores": scores}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the chosen and rejected scores as one tensor (B, 2).

        Of several processes each scores its part, and every one gets all scores.
        """
        prepared = self._prepare_inputs(inputs)
        part, device = self.world.part(len(prepared["input_ids"]) // 2), self.args.device
        both_B2 = torch.zeros((0, 2), device=device)
        if part:
            with torch.no_grad():
                scores = model(**part_of(prepared, part))
            both_B2 = torch.stack(scores.chunk(2), dim=1)
        if self.world.size > 1:
            both_B2 = torch.cat(self.world.gather(both_B2.cpu())).to(device)
        return pair_loss(both_B2.T.flatten()), both_B2, torch.zeros(len(both_B2))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        model, head = self.model.model, self.model.head
        save.save_model(model, head, self.tokenizer, folder, template=self.template, answers=True)
        text = json.dumps(self.record, indent=2) + "\n"
        (folder / RECORD).write_text(text, encoding="utf-8")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.draw()

    def draw(self) -> None:
        """Draw LLaMA-Factory's pictures of everything logged so far (`plot_loss`)."""
        if self.plots and self.world.main:
            plots.plot_log(self.state.log_history, PLOTTED, Path(self.args.output_dir))


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, margin and calibration of the scores (N, 2) of pairs."""
    return pair_metrics(prediction.predictions[:, 0], prediction.predictions[:, 1])
