"""What others have of the same, from their PyPI packages in a folder of their own.

    python -m benchmarks.peers.install

Single modules are loaded and no package's __init__ is run: those want ray, a GPU's triton, or half
of a reinforcement-learning library, for files that need torch alone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

SITE = Path(__file__).parent / ".site"
# Without their dependencies. What torchrl's file needs stands behind it.
PINS = {
    "liger-kernel": "0.8.5",
    "cut-cross-entropy": "25.1.1",
    "verl": "0.9.1",
    "trl": "1.16.0",
    "openrlhf": "0.11.2",
    "torchrl": "0.14.1",
    "tensordict": "0.15.3",
    "pyvers": "0.2.3",
    "cloudpickle": "3.1.3",
    "orjson": "3.13.0",
    "importlib_metadata": "10.2.0",
}


class Absent(Exception):
    """A peer that is not here, and the cure."""


def label(package: str) -> str:
    """A peer's name in tables."""
    return f"{package} {PINS[package]}"


def load(package: str, module: str) -> ModuleType:
    """A peer's module.

    Raises:
        Absent: the package is not in the folder, or not in the pinned version.
    """
    folder = SITE / f"{package.replace('-', '_')}-{PINS[package]}.dist-info"
    if not folder.exists():
        raise Absent("not installed; run: python -m benchmarks.peers.install")
    if str(SITE) not in sys.path:
        sys.path.append(str(SITE))
    parents = module.split(".")[:-1]
    for depth in range(len(parents)):
        _bare(".".join(parents[: depth + 1]))
    if package != "verl":
        return importlib.import_module(module)
    with _without("liger_kernel"):  # where it is there, verl's file takes it over
        return importlib.import_module(module)


def _bare(name: str) -> None:
    """The package in sys.modules, its __init__ not run."""
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(SITE.joinpath(*name.split(".")))]
        sys.modules[name] = package


class _Refusal(MetaPathFinder):
    """Says of one package that it is not installed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, *_: object) -> None:
        if fullname == self.name:
            raise ModuleNotFoundError(f"{fullname} is kept out", name=fullname)


@contextmanager
def _without(name: str) -> Iterator[None]:
    """For the length of a block the package `name` cannot be imported."""
    found = [key for key in sys.modules if key.split(".")[0] == name]
    kept = {key: sys.modules.pop(key) for key in found}
    refusal = _Refusal(name)
    sys.meta_path.insert(0, refusal)
    try:
        yield
    finally:
        sys.meta_path.remove(refusal)
        sys.modules.update(kept)
