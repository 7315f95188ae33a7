"""Seconds by phase of a trainer's steps, by wrapping the functions that it calls.

Read in every peer's own environment, so it imports nothing but torch.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GIB = 2**30


class Finished(Exception):
    """All steps that were asked for are done."""


class Watch:
    """Exclusive times: a phase within another takes its time away from that one.

    What is in no phase (and in `update`) is the rest of the step: the update's forwards and losses,
    the optimiser.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.began = time.perf_counter()
        self.facts: dict[str, Any] = {"torch": torch.__version__}
        self.steps: list[dict[str, float]] = []
        self._now: defaultdict[str, float] = defaultdict(float)
        self._stack: list[list[Any]] = []

    def phase(self, owner: Any, name: str, phase: str | Callable[[], str | None]) -> None:
        """Count the time of `owner.name` as that phase; None from a function is no phase."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            own = phase() if callable(phase) else phase
            if own is None or (self._stack and self._stack[-1][0] == own):
                return original(*args, **kwargs)
            began, frame = time.perf_counter(), [own, 0.0]
            self._stack.append(frame)
            try:
                return original(*args, **kwargs)
            finally:
                taken = time.perf_counter() - began
                self._stack.pop()
                self._now[own] += taken - frame[1]
                if self._stack:
                    self._stack[-1][1] += taken

        setattr(owner, name, timed)

    def current(self) -> str:
        """The phase that runs now."""
        return str(self._stack[-1][0]) if self._stack else "update"

    def begin(self) -> None:
        """The first step starts now."""
        self.facts["load_seconds"] = time.perf_counter() - self.began
        self._now.clear()
        self._lap = time.perf_counter()

    def lap(self) -> None:
        """A step ended; the last one raises Finished."""
        total = time.perf_counter() - self._lap
        named = {name: self._now[name] for name in ("generate", "score", "backward")}
        self.steps.append({"total": total, **named, "update": total - sum(named.values())})
        self._now.clear()
        self._lap = time.perf_counter()
        print(json.dumps(self.steps[-1]), file=sys.stderr, flush=True)
        if len(self.steps) == self.settings["steps"]:
            raise Finished

    def peak_gib(self) -> float:
        """The most memory that the process ever had."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB

    def write(self) -> None:
        """Steps, facts and the process's peak memory, into the file that the settings name."""
        found = {"steps": self.steps, "threads": torch.get_num_threads()}
        text = json.dumps({"peak_gib": self.peak_gib(), **found, **self.facts})
        Path(self.settings["result"]).write_text(text, encoding="utf-8")


def scoring() -> str | None:
    """A forward without gradient is scoring, one with is the update's."""
    return None if torch.is_grad_enabled() else "score"


def trainable(*models: torch.nn.Module) -> int:
    """Parameters that train, each once; and all in float32, or the comparison is off."""
    parameters = {p for model in models for p in model.parameters()}
    other = {p.dtype for p in parameters if p.is_floating_point()} - {torch.float32}
    assert not other, other
    return sum(p.numel() for p in parameters if p.requires_grad)


def main(run: Callable[[dict[str, Any], Watch], None]) -> None:
    """Run a contender's script: `python run_NAME.py settings.json`."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.manual_seed(settings["seed"])
    watch = Watch(settings)
    watch.phase(torch.Tensor, "backward", "backward")
    try:
        run(settings, watch)
    except Finished:
        watch.write()
