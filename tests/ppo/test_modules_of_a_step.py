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
# What somebody reads who wants to follow a step, in this order.
STEP = {
    *("types", "ppo.trainer"),
    *("ppo.rollout", "ppo.sampler", "ppo.slots", "ppo.sampling"),
    *("ppo.score", "models.roles", "models.batch"),
    *("ppo.advantage", "ppo.update", "ppo.metrics"),
}
# What a step calls besides, and why it is no part of those.
BESIDE = {
    "ops": "the operators: a package of their own, without the trainer",
    "config.ppo": "what follows from several keys: settings are read where they act",
    "memory.retry": "every phase may run out of memory, and is tried again",
    "seeds": "each draw has a seed of its own; a retry starts from the same random numbers",
    "models.lora": "LoRA's layers run by it in any forward",
    "models.native_layers": "norms and gated MLPs run by it in any forward on a CPU",
    "models.rounding": "the precision of products: asked in each step, as a reward may change it",
    "ppo.cpu_layers": "the same layers, faster on a CPU",
    "ppo.guards": "looks at the finished row, which has the guards' columns",
    "rewards.reward": "adds up rewards of any kind",
    "rewards.function": "one kind, the toy's; models and servers are others",
    "run.world": "which rows are this process's; alone it gives back what it was given",
}


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
    """The toy's step, without signals: so nothing is entered that could undo it."""
    monkeypatch.chdir(tmp_path)
    # A small step enters what a large one does; each call of each function is looked at.
    small = {"per_device_train_batch_size": 4, "ppo_epochs": 2, "max_new_tokens": 4}
    state = trainer.init_state(toy.config("toy", max_steps=3, metrics_dir="metrics", **small))
    trainer.step_update(state)
    # The toy's reward function stands in the place of the user's own.
    entered = modules_entered(trainer.step_update, state) - {"toy"}
    print(f"{len(entered)} modules: {', '.join(sorted(entered))}")
    assert entered >= STEP
    beside = entered - STEP
    assert beside <= BESIDE.keys(), f"{sorted(beside - BESIDE.keys())}: write here why they are"


def test_a_step_is_a_dozen_modules():
    assert len(STEP) == 12
    assert not STEP & BESIDE.keys()


def test_the_page_names_what_a_step_is():
    """docs/step.md draws the way through them, and says what may be left closed."""
    page = (PACKAGE.parent / "docs" / "step.md").read_text(encoding="utf-8")
    drawing, _, rest = page.partition("```\n")[2].partition("```\n")
    for name in STEP:
        assert name.rpartition(".")[2] + ".py" in drawing, name
    for name in BESIDE.keys() - {"ops"}:
        assert f"{name.replace('.', '/')}.py" in rest.partition("## ")[0], name
