"""Where a section runs, and at which sizes: those of real models, and toy ones for a rehearsal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch

# Writes a row of results.
Add = Callable[..., None]


@dataclass(frozen=True)
class Plan:
    """The sizes of a run.

    Args:
        device: cuda, or cpu in a rehearsal.
        rows: tokens whose logits there are.
        vocabularies: the most important first, since a section may be cut off.
        dtypes: of logits.
        hidden: hidden size of the section `linear`, whose vocabulary is `head`.
        head: see above.
        tokens: numbers of tokens of the section `linear`.
        rounds: how often a contender is timed.
        wash: bytes that are overwritten before each call, more than the L2 cache holds.
        workers: threads that compile.
        part: which share of a section this process does, (0, 6) the first of six.
        warm: whether to call everything once and measure nothing.
        length: tokens of a sequence of the trainer's section.
        imported: seconds that imports took.
    """

    device: str
    rows: int
    vocabularies: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    hidden: int
    head: int
    tokens: tuple[int, ...]
    rounds: int
    wash: int
    workers: int
    part: tuple[int, int] = (0, 1)
    warm: bool = False
    length: int = 2048
    imported: dict[str, float] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


BOTH = (torch.bfloat16, torch.float32)
REAL: Final = Plan(
    device="cuda",
    rows=4096,
    vocabularies=(151936, 128256, 32000),
    dtypes=BOTH,
    hidden=4096,
    head=131072,
    tokens=(8192, 2048),
    rounds=11,
    wash=256 << 20,
    workers=8,
)
TOY: Final = Plan(
    device="cpu",
    rows=2,
    vocabularies=(96,),
    dtypes=BOTH,
    hidden=8,
    head=64,
    tokens=(3,),
    rounds=1,
    wash=1 << 10,
    workers=1,
    length=96,
)


def make_plan(rehearse: bool, *, part: str, tokens: int | None, imported: dict[str, float]) -> Plan:
    """The plan of a process: `part` is as in the command line, "2/6" or "warm"."""
    changes: dict[str, Any] = {"imported": imported}
    if part == "warm":
        changes["warm"] = True
    else:
        number, _, count = part.partition("/")
        changes["part"] = (int(number) - 1, int(count))
    if tokens is not None:
        changes["length"] = tokens
    return Plan(**{**vars(TOY if rehearse else REAL), **changes})
