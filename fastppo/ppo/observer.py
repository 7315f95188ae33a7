"""What follows a PPO step: a log line, an evaluation, a checkpoint, the end of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastppo.ppo.state import State


@dataclass
class Due:
    """What the loop does after a step."""

    log: bool = False
    evaluate: bool = False
    save: bool = False

    @classmethod
    def by_config(cls, state: State) -> Due:
        """What the configuration asks for after the step that `state` has finished.

        The last step of a run is evaluated and saved at its end.
        """
        config, step, steps = state.config, state.step, state.total_steps
        epoch = len(state.prompts) / config.prompts_a_step

        def acts(what: str) -> bool:
            return config.acts(what, step, steps, epoch)

        more = step < steps
        return cls(log=acts("logging"), evaluate=more and acts("eval"), save=more and acts("save"))


class Observer:
    """Is told what the loop does, and decides what follows a step: here, by the configuration.

    PPOTrainer's passes everything on to transformers' callbacks, which can change what follows.
    """

    stops: bool = False  # whether training ends before its last step

    def train_begin(self, state: State) -> None:
        """Training begins, or goes on from a checkpoint."""

    def step_begin(self, state: State) -> None:
        """A step begins."""

    def step_end(self, state: State) -> Due:
        """A step has ended; returns what follows it."""
        return Due.by_config(state)

    def logged(self, state: State) -> None:
        """The last step has been logged."""

    def evaluated(self, state: State) -> None:
        """The policy has been evaluated; the metrics are the last of `state.evaluations`."""

    def saved(self, state: State) -> None:
        """A checkpoint has been written."""

    def train_end(self, state: State) -> None:
        """The policy has been trained, evaluated and saved."""
