"""The sections in the order in which they run, each with its time limit; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
RESULTS: Final = ROOT / "benchmarks" / "results"

# Seconds for everything: the sections, which include the start of their processes, and the report.
TOTAL: Final = 358.0


@dataclass(frozen=True)
class Section:
    """A part of the run.

    Args:
        name: of its module, its JSON, and as `--only` takes it.
        limit: seconds after which it is cut off, the start of its process included.
        title: heading in the report.
        processes: number of processes that share its work; more than one only without a clock.
        timed: whether it measures time, so that nothing else may run beside it.
        warm_up: whether its kernels are compiled in the background while nothing is timed.
        trainer: whether it needs the trainer's packages, pydantic among them.
    """

    name: str
    limit: float
    title: str
    processes: int = 1
    timed: bool = True
    warm_up: bool = False
    trainer: bool = False


SECTIONS: Final = (
    Section("launch", 20, "Imports, and one launch of each kernel", timed=False),
    Section("oracle", 75, "Right answers on the device", processes=6, timed=False),
    Section("logits", 75, "Operators over logits, as a share of a copy", warm_up=True),
    Section("linear", 60, "Log-probs and losses from hidden states", warm_up=True),
    Section("trainer", 90, "Reward and PPO steps of a 7B", trainer=True),
    Section("sampler", 30, "Tokens a second of the sampler", warm_up=True, trainer=True),
)
BY_NAME: Final = {section.name: section for section in SECTIONS}
# What a rehearsal hides, so that it proves what the sections do without.
HIDDEN: Final = ("datasets",)
HIDDEN_WITHOUT_TRAINER: Final = (
    *HIDDEN,
    "annotated_types",
    "pydantic",
    "pydantic_core",
    "typing_inspection",
)
