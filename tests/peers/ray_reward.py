"""The toy's reward, which ends its process once: at a step, as a machine that dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from fastppo import toy


def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    """toy.vowels; with DIES="rank step folder" that process dies in it, and leaves folder/died."""
    rank, step, folder = os.environ.get("DIES", "-1 0 -").split(" ", 2)
    died = Path(folder, "died")
    if os.environ["RANK"] == rank and steps_done(Path(folder)) == int(step) - 1:
        try:
            died.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass  # it has died there before
    return toy.vowels(prompts, completions)


def steps_done(folder: Path) -> int:
    """The rows of the run's metrics so far."""
    rows = folder / "metrics" / "training_metrics.csv"
    return len(rows.read_text().splitlines()) - 1 if rows.exists() else 0
