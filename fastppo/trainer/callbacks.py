"""transformers' callbacks around the loop, and the state and control that they see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState

from fastppo.config.training import every_steps
from fastppo.ppo import log
from fastppo.ppo.observer import Due, Observer

if TYPE_CHECKING:
    from fastppo.ppo.state import State


@dataclass
class PPOTrainerState(TrainerState):
    """transformers' TrainerState; `global_step` is a PPO step, `episode` a response, as in TRL."""

    episode: int = 0


class FlowCallback(DefaultFlowCallback):
    """Asks the configuration what follows a step, in place of transformers' own rules.

    They are the same but for the last step, which is evaluated and saved at the end of the run.
    """

    def __init__(self) -> None:
        self.due = Due()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_log |= self.due.log
        control.should_evaluate |= self.due.evaluate
        control.should_save |= self.due.save
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        return control


class CallbackObserver(Observer):
    """Passes what the loop does on to callbacks, and what they decide back to the loop."""

    def __init__(self, args: Any, handler: CallbackHandler) -> None:
        self.args, self.handler = args, handler
        self.state, self.control = PPOTrainerState(), TrainerControl()
        self.due = Due()
        self.evaluated_at = -1
        self.epoch = -1  # the last one that has begun

    @property
    def stops(self) -> bool:  # type: ignore[override]
        """Whether a callback has asked to end training."""
        return bool(self.control.should_training_stop)

    def call(self, event: str, **how: Any) -> None:
        """Call one event of all callbacks, which may change the control."""
        method: Any = getattr(self.handler, event)
        control = self.control = method(self.args, self.state, self.control, **how)
        # The loop reads these as it goes: a callback can ask for a checkpoint in on_evaluate.
        self.due.log, self.due.evaluate = control.should_log, control.should_evaluate
        self.due.save = control.should_save

    def sync(self, state: State) -> None:
        """Bring the TrainerState up to date with the run."""
        rows = state.metrics.rows
        self.state.global_step = state.step
        self.state.max_steps = state.total_steps
        self.state.episode = log.responses_sampled(state)
        self.state.epoch = rows[-1]["epoch"] if rows else 0
        self.state.num_input_tokens_seen = log.tokens_sampled(state)
        self.state.log_history = log.log_history(state)

    def train_begin(self, state: State) -> None:
        """Set what a run knows at its start, and call on_train_begin."""
        config, total = state.config, state.total_steps
        self.state.logging_steps = every_steps(config.logging_steps or 1, total)
        self.state.eval_steps = every_steps(config.eval_steps or config.logging_steps or 500, total)
        self.state.save_steps = every_steps(config.save_steps, total)
        self.state.train_batch_size = config.per_device_train_batch_size
        self.state.num_train_epochs = config.num_train_epochs  # type: ignore[assignment]
        self.sync(state)
        self.epoch, self.evaluated_at = -1, -1
        self.control.should_training_stop = False
        self.call("on_train_begin")

    def step_begin(self, state: State) -> None:
        """Call on_step_begin, and on_epoch_begin before the first step of an epoch."""
        epoch = int(self.state.epoch + 1e-9)
        if epoch > self.epoch:
            self.epoch = epoch
            self.call("on_epoch_begin")
        self.call("on_step_begin")

    def step_end(self, state: State) -> Due:
        """Call on_step_end, after the last step of an epoch on_epoch_end; returns what is due."""
        self.sync(state)
        for callback in self.handler.callbacks:
            if isinstance(callback, FlowCallback):
                callback.due = Due.by_config(state)
        self.call("on_step_end")
        if self.state.epoch + 1e-9 >= self.epoch + 1:
            self.call("on_epoch_end")
        return self.due

    def logged(self, state: State) -> None:
        """Call on_log with the step's metrics."""
        entry = log.step_entry(state.metrics.rows[-1], state.config)
        self.call("on_log", logs=dict(entry))

    def evaluated(self, state: State) -> None:
        """Note the best metric so far, and call on_log and on_evaluate; once after each step."""
        if self.evaluated_at == state.step:
            return
        self.evaluated_at = state.step
        metrics = dict(state.evaluations[-1])
        metrics.pop("step", None)
        self.sync(state)
        self.call("on_log", logs=dict(metrics))
        self.call("on_evaluate", metrics=metrics)
        # As in transformers afterwards: EarlyStoppingCallback compares with the best before.
        self.note_best(metrics)

    def note_best(self, metrics: dict[str, Any]) -> None:
        """Keep the best value of metric_for_best_model, and its step."""
        name = self.args.metric_for_best_model
        if name is None:
            return
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
        if value is None:
            return
        best, greater = self.state.best_metric, self.args.greater_is_better
        if best is None or (value > best if greater else value < best):
            self.state.best_metric = value
            self.state.best_global_step = self.state.global_step

    def saved(self, state: State) -> None:
        """Note the checkpoint of the best step, and call on_save."""
        folder = Path(state.config.output_dir) / f"checkpoint-{state.step}"
        if self.state.best_global_step == state.step:
            self.state.best_model_checkpoint = str(folder)
        self.note_callbacks()
        self.call("on_save")

    def train_end(self, state: State) -> None:
        """Call on_log with the numbers of the whole run, then on_train_end."""
        self.sync(state)
        self.call("on_log", logs=log.train_metrics(state))
        self.call("on_train_end")

    def note_callbacks(self) -> None:
        """Write the state of callbacks that have one into the TrainerState."""
        all_of_them = (*self.handler.callbacks, self.control)
        found: Any = [each for each in all_of_them if isinstance(each, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=found).stateful_callbacks
