"""What stage rm says while it trains: lines, a bar, and the trackers' entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from fastppo.run import console

if TYPE_CHECKING:
    import torch

    from fastppo.config import Config
    from fastppo.memory.plan import Plan
    from fastppo.run.tracking import Trackers


class Lines(TrainerCallback):
    """A line a log entry, with the time left, in place of transformers' bare dictionaries."""

    def __init__(self, plan: Plan | None, device: torch.device, longest: int) -> None:
        self.clock = console.Clock()
        self.plan, self.device, self.longest = plan, device, longest

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What the first step took."""
        if state.global_step == 1:
            console.memory_line(self.plan, self.device, cutoff_len=self.longest)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Print a training or evaluation entry."""
        if not logs:
            return
        if "loss" in logs:
            elapsed = self.clock.columns()["seconds"]
            left = elapsed / state.global_step * (state.max_steps - state.global_step)
            console.console.print(
                f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}  "
                f"learning rate {float(logs['learning_rate']):.2g}  {console.clock_face(left)} left"
            )
        elif "eval_accuracy" in logs:
            console.console.print(
                f"evaluation: accuracy {logs['eval_accuracy']:.3f}, loss {logs['eval_loss']:.4f}, "
                f"mean margin {logs['eval_margin']:+.3f}"
            )


class Bar(TrainerCallback):
    """`disable_tqdm: false`: a bar below the lines, as in stage ppo."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw it."""
        self.bar = console.progress(self.config, state.max_steps, state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step more."""
        self.bar.advance(self.bar.task_ids[0])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave it as it stands."""
        self.bar.stop()


class Report(TrainerCallback):
    """Log entries to the trackers of `report_to`, under the names that transformers gives them."""

    def __init__(self, trackers: Trackers) -> None:
        self.trackers = trackers

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """eval_loss is eval/loss, loss is train/loss."""
        named = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": x
            for name, x in (logs or {}).items()
        }
        self.trackers.log(named, step=state.global_step)
