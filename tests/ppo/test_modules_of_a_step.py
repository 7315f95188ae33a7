"""How many modules a reader has to open to follow one PPO step."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from fastppo import toy
from fastppo.ppo import trainer

PACKAGE = Path(trainer.__file__).parents[1]
MOST = 26


def modules_entered(function: Any, *args: Any) -> set[str]:
    """Modules of fastppo whose functions run in a call; operators and their kernels are one.

    Without the collector of garbage, which calls `__del__` of what earlier code has left.
    """
    files: set[str] = set()  # a path is made of each in the end: a step makes a million calls

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    before = sys.getprofile()
    gc.disable()
    sys.setprofile(note)
    try:
        function(*args)
    finally:
        sys.setprofile(before)
        gc.enable()
    parts = [
        path.relative_to(PACKAGE).with_suffix("").parts
        for path in map(Path, files)
        if PACKAGE in path.parents
    ]
    return {
        "ops" if first in ("ops", "kernels") else ".".join((first, *rest)) for first, *rest in parts
    }


def test_a_step_enters_few_modules(tmp_path, monkeypatch):
    """A dozen would be better; these stand in the way of it.

    - `ppo` is the step itself: trainer, rollout, score, advantage, update and metrics. Sampling is
      five of its own: the settings and merged adapters (sampling), the loop (sampler), a token's
      draw (draws), the KV cache and its attention (slots) and, on a CPU, faster layers
      (cpu_layers). Guards look at each row, which has their columns; the state keeps a sample of
      the scored rollout for the live view.
    - `models` runs the roles: which adapter is on (roles), micro-batches (batch), LoRA's layers
      (fused_lora), and the precision of products (rounding). That is asked for in every step,
      because an autocast around the loop counts, and so do flags that a reward function sets.
    - Any phase may run out of memory, so each is called through `retry`, which keeps the state of
      the random numbers (seeds).
    - `rewards.reward` adds up the rewards; `rewards.function` calls one that is a function.
    - `run.world` says which rows are this process's, and what all processes have: alone it gives
      back what it was given.
    - `types` is what passes between the phases, and `config.ppo` has the keys that follow from
      others (the two sides of the clip range, whether advantages are whitened), `config.schema`
      what follows from keys of several groups (prompts a step, which importance weights).

    Signals are not handled here, so nothing is entered that could undo a step.
    """
    monkeypatch.chdir(tmp_path)
    # A small step enters what a large one does; each call of each function is looked at.
    small = {"per_device_train_batch_size": 4, "ppo_epochs": 2, "max_new_tokens": 4}
    state = trainer.init_state(toy.config("toy", max_steps=3, metrics_dir="metrics", **small))
    trainer.step_update(state)
    # The toy's reward function stands in the place of the user's own.
    entered = modules_entered(trainer.step_update, state) - {"toy"}
    print(f"{len(entered)} modules: {', '.join(sorted(entered))}")
    assert {"ppo.trainer", "ppo.rollout", "ppo.score", "ppo.advantage", "ppo.update"} < entered
    assert len(entered) <= MOST, sorted(entered)
