"""Seconds and peak memory of each phase of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastppo.ppo.metrics import Clock

GIB = 2**30


class Phases(Clock):
    """The trainer's clock, with the peak memory of each phase; it waits for the device."""

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.cuda, self.found = cuda, dict[str, dict[str, float]]()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with super().__call__(phase):
            yield
            if self.cuda:
                torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / GIB if self.cuda else 0.0
        self.found[phase] = {
            "seconds": round(self.seconds[phase], 3),
            "peak_gib": round(peak, 2),
        }
