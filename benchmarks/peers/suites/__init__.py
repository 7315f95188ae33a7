"""The peers' own test files, run with their function replaced by an adapter onto ours.

    python -m benchmarks.peers.suites DIR

DIR has checkouts of the peers' repositories, by their names; none of their code is here. A test
counts if it called an adapter, so their tests of something else do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

PEERS = ("liger", "verl", "torchrl", "openrlhf")


class Known(NamedTuple):
    """A failure that has an explanation: what its test is called, whose fault it is, and why."""

    test: str  # a regular expression that the test's name fits whole
    fault: str
    why: str


@dataclass(frozen=True)
class Suite:
    """What to run of a peer's checkout, and what is put in place of what."""

    folder: str  # name of the repository
    files: tuple[str, ...]
    replaced: dict[str, Any]  # names in their test modules -> our adapters
    path: tuple[str, ...] = (".",)  # folders of the checkout from which modules are imported
    select: str = ""  # pytest's -k: what to run
    why: str = ""  # the rest is not
    known: tuple[Known, ...] = ()
    package: str = ""  # of benchmarks.peers.PINS, where the library is that and not the checkout
    conftest: bool = False
    prepare: Callable[[Path], None] | None = None  # before their test files are imported


def suite_of(peer: str) -> Suite:
    """The suite of one of PEERS."""
    module: ModuleType = import_module(f"benchmarks.peers.suites.{peer}")
    found = module.SUITE
    assert isinstance(found, Suite)
    return found


calls = 0


def ours(function: Callable[..., Any]) -> Callable[..., Any]:
    """An adapter, whose calls are counted."""

    @wraps(function)
    def counted(*given: Any, **named: Any) -> Any:
        global calls
        calls += 1
        return function(*given, **named)

    return counted
