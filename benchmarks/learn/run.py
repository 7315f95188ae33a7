"""What all runs of `python -m benchmarks.learn` have in common."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar


def file_name(section: str, words: str, seed: int) -> str:
    """The name of a run's JSON: its section, what of `words` is letters and digits, its seed."""
    kept = "".join(c if c.isalnum() else " " for c in words.lower()).split()
    return f"{section}-{'-'.join(kept)}-{seed}.json"


class TrainingRun:
    """One training run, whose result is a JSON; a subclass is a frozen dataclass.

    Attributes:
        changes: keys that differ from `base`, or are not in it.
        quick: keys of a walk that measures nothing.
    """

    section: str
    task: str
    name: str
    seed: int
    changes: dict[str, Any]
    quick: ClassVar[dict[str, Any]]

    @property
    def base(self) -> dict[str, Any]:
        """Keys that are the same in all runs of a kind."""
        raise NotImplementedError

    @property
    def file(self) -> str:
        """The name of its JSON."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """All keys that are not fastppo's defaults, without the names of files."""
        return {**self.base, **self.changes, "seed": self.seed}

    def train(self, quick: bool = False) -> dict[str, Any]:
        """Train in a folder of its own; returns what its JSON says."""
        settings = {**self.settings, **(self.quick if quick else {})}
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = self.result(settings, Path(folder), quick)
        return {
            "section": self.section,
            "task": self.task,
            "name": self.name,
            "seed": self.seed,
            "settings": settings,
            **found,
            "seconds": round(time.monotonic() - began, 1),
        }

    def result(self, settings: dict[str, Any], place: Path, quick: bool) -> dict[str, Any]:
        """Train below `place`; returns what only runs of this kind have."""
        raise NotImplementedError
