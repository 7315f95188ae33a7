"""A point of a run at which memory may be highest: its phase, and the rows of the plan there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PHASES: Final = ("load", "rollout", "score", "update")
# vLLM beside the trainer, in a process of its own.
ENGINE_ROWS: Final = ("vLLM weights", "vLLM cache")
ROWS: Final = (
    "base weights",
    "reference weights",
    "reward weights",
    "critic weights",
    "actor adapter",
    "reference adapter",
    "reward adapter",
    "critic adapter",
    "actor optimiser",
    "critic optimiser",
    "actor gradients",
    "critic gradients",
    *ENGINE_ROWS,
    "merged weights",
    "KV cache",
    "shared states",
    "kept activations",
    "layer at work",
    "head chunk",
    "reserve",
)


@dataclass(frozen=True)
class Peak:
    """A point of a run at which memory may be highest, with the bytes in memory by row."""

    phase: str
    name: str
    rows: dict[str, int]
    evaluation: bool = False

    @property
    def total(self) -> int:
        """The sum of all rows, in bytes."""
        return sum(self.rows.values())
