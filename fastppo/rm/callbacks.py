"""Callbacks of stage rm's Trainer: printed lines, bar, log file, trackers, skipped steps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from fastppo.errors import TrainingStopped
from fastppo.run import console, live, record, results

if TYPE_CHECKING:
    import torch

    from fastppo.config import Config
    from fastppo.memory.plan import Plan
    from fastppo.rm.trainer import ResumableTrainer
    from fastppo.run.tracking import Trackers


class PrintLogs(TrainerCallback):
    """Prints a line for each log entry; transformers would print the dictionary."""

    def __init__(self, plan: Plan | None, device: torch.device, longest: int) -> None:
        self.began = time.monotonic()
        self.plan, self.device, self.longest = plan, device, longest

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Print the memory that the first step took."""
        if state.global_step == 1:
            line = console.memory_line(self.plan, self.device, cutoff_len=self.longest)
            record.add(Path(args.output_dir), memory=line)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Print a training or evaluation entry."""
        if not logs:
            return
        if "loss" in logs:
            elapsed = time.monotonic() - self.began
            left = elapsed / state.global_step * (state.max_steps - state.global_step)
            console.console.print(
                f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}  "
                f"learning rate {float(logs['learning_rate']):.2g}  "
                f"{console.format_duration(left)} left"
            )
        elif "eval_accuracy" in logs:
            console.console.print(
                f"evaluation: accuracy {logs['eval_accuracy']:.3f}, loss {logs['eval_loss']:.4f}, "
                f"mean margin {logs['eval_margin']:+.3f}"
            )


class ProgressBar(TrainerCallback):
    """Draws the live view below the lines, as in stage ppo."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start at step 0, or at the step from which a resumed run continues."""
        self.view = live.LiveView(self.config, state.max_steps, state.global_step)
        self.view.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance by a step."""
        self.view.advance(self.view.task_ids[0])

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the logged losses and accuracies; an evaluation without training has no view."""
        if hasattr(self, "view"):
            history, names = state.log_history, {"loss": "loss", "eval_accuracy": "accuracy"}
            self.view.curves = {
                label: [entry[name] for entry in history if name in entry]
                for name, label in names.items()
            }

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop drawing."""
        self.stop()

    def stop(self) -> None:
        """Stop drawing if it has begun, also where training ended by an error or a signal."""
        if hasattr(self, "view") and self.view.live.is_started:
            self.view.stop()


class LogToTrackers(TrainerCallback):
    """Sends log entries to the trackers of `report_to`, by the names that transformers uses."""

    def __init__(self, trackers: Trackers) -> None:
        self.trackers = trackers

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Send an entry, for example eval_loss as eval/loss, and loss as train/loss."""
        named = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": x
            for name, x in (logs or {}).items()
        }
        self.trackers.log(named, step=state.global_step)


class LogFile(TrainerCallback):
    """Writes LLaMA-Factory's trainer_log.jsonl; an evaluation without training writes no file."""

    began: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the file; a resumed run appends to the existing one."""
        self.began = time.monotonic()
        results.begin_log(Path(args.output_dir), state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Append the line of a training or evaluation entry."""
        if self.began is not None:
            results.log_line(
                Path(args.output_dir),
                state.log_history[-1],
                step=state.global_step,
                total_steps=state.max_steps,
                seconds=time.monotonic() - self.began,
            )


class RestoreSums(TrainerCallback):
    """Restores the running sums of the loss in a resumed run."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Restore the sums, which transformers has just set to 0."""
        trainer = self.trainer
        if trainer.resumed is not None:
            for name, value in trainer.resumed["sums"].items():
                setattr(trainer, name, value)
            trainer._tr_loss = trainer._tr_loss.to(trainer.args.device)
            trainer.bad_run = trainer.resumed["bad_run"]
            trainer.overflow_steps = trainer.resumed.get("overflow_steps", 0)


class SkipNonfiniteSteps(TrainerCallback):
    """Skips optimiser steps whose gradient is not finite; stops after max_bad_steps in a row."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer
        self.overflowed = False  # the current step, only because of the loss scale

    def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Remove all gradients if one is not finite: then the optimiser changes nothing."""
        trainer = self.trainer
        parameters = list(trainer.trainable_parameters().values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        finite_loss, trainer.finite_loss = trainer.finite_loss, True
        self.overflowed = False
        if nn.utils.get_total_norm(gradients).isfinite():
            trainer.bad_run = 0
            return
        for parameter in parameters:
            parameter.grad = None
        if finite_loss and trainer.loss_scale > 1:
            self.note_overflow(state.global_step + 1)
            return
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
            if trainer.world.main:
                save_file({name: x.cpu().contiguous() for name, x in trainer.inputs.items()}, path)
            raise TrainingStopped(
                f"{trainer.bad_run} steps in a row had a gradient that is not finite "
                f"(max_bad_steps); the last batch is in {path}; the likeliest cause: learning_rate"
                + ("; or this model overflows float16, and bf16: true would not" * self.fp16)
            )

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Make the schedule wait after an overflow: accelerate misses one of a fused optimiser."""
        if self.overflowed:
            optimizer: Any = self.trainer.optimizer
            optimizer._is_overflow = True

    @property
    def fp16(self) -> bool:
        """Whether the loss is scaled."""
        return self.trainer.accelerator.scaler is not None

    def note_overflow(self, step: int) -> None:
        """Count a step that is skipped because the loss scale made its gradient infinite."""
        trainer, self.overflowed = self.trainer, True
        trainer.overflow_steps += 1
        if trainer.overflow_steps == 1:
            console.console.print(
                f"[yellow]note:[/yellow] fp16: the gradient of step {step} is beyond float16's "
                f"range at a loss scale of {trainer.loss_scale:g}; the step was skipped, the scale "
                "is halved: so it is found in a run's first steps, overflow_steps counts them"
            )
