"""A process of a run that ends at a place.

`DIES="rank step place" python -m tests.reliability.dying CONFIG` is the command, in which that
process kills itself there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from fastppo import cli
from fastppo.ppo import checkpoint, sampling, score, trainer
from fastppo.rm import trainer as pair_trainer
from fastppo.run import training_state
from fastppo.run.world import World

PLACES: dict[str, tuple[Any, str]] = {
    "sampling": (sampling.Draws, "draw"),
    "scoring": (score, "token_scores"),
    "the reduce": (World, "_reduce"),
    "the save": (training_state, "write"),
    "waiting for the save": (World, "on_main"),
    "a pair": (pair_trainer, "pair_loss"),
}


def die() -> None:
    """As a machine dies: without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """As a file system hangs."""
    time.sleep(60)


def ends(rank: int, who: int, place: str, step: int, how: Any = die) -> None:
    """Process `who` ends at the first call of a place in step `step` (of stage rm: at call `step`).

    What is at the end of a step, its save, belongs to that step.
    """
    if rank != who:
        return
    owner, name = PLACES[place]
    inner, inner_step = getattr(owner, name), trainer.step_update
    at, calls = [0], [0]

    def step_update(state: Any) -> Any:
        at[0] = state.step + 1
        return inner_step(state)

    def ending(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        saves = place != "waiting for the save" or checkpoint.save_between_steps in args
        if step == (calls[0] if place == "a pair" else at[0]) and saves:
            how()
        return inner(*args, **kwargs)

    trainer.step_update = step_update
    setattr(owner, name, ending)


if __name__ == "__main__":
    who, step, place = os.environ["DIES"].split(" ", 2)
    ends(int(os.environ["RANK"]), int(who), place, int(step))
    sys.exit(cli.main())
