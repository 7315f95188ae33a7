"""Stubs in place of what a peer's module imports and the function in question does not use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


def stub(name: str, **attributes: Any) -> None:
    """A module in place of one that the peer imports and the function does not use."""
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(attributes)


@contextmanager
def in_place_of(*names: str, **attributes: Any) -> Iterator[None]:
    """Stubs for packages that are not installed, for as long as a module of a peer is loaded."""
    for name in names:
        stub(name, **attributes)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class ActorConfig(SimpleNamespace):
    """Stands for verl's; `get` and `global_batch_info` are all that the losses ask of it."""

    global_batch_info: dict[str, Any]

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def verl_core(folder: Path, load: Callable[[str], Any]) -> Any:
    """verl.trainer.ppo.core_algos of the package in `folder`, without running any __init__.

    Args:
        folder: of the package verl.
        load: imports a module of it by name.
    """
    empty = type("Empty", (), {})
    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.utils"):
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules.setdefault(name, package)
    stub("verl.trainer.config", AlgoConfig=empty)
    stub("verl.trainer.config.algorithm", RolloutCorrectionConfig=empty)
    stub("verl.workers")
    stub("verl.workers.config", ActorConfig=ActorConfig)
    stub("verl.workers.config.actor", PolicyLossConfig=SimpleNamespace, ActorConfig=ActorConfig)
    stub("verl.protocol", DataProto=empty)
    groupwise: Any = load("verl.utils.groupwise")
    names = ("as_torch_index", "group_mean_std")
    stub("verl.utils", **{name: getattr(groupwise, name) for name in names})
    with in_place_of("omegaconf", DictConfig=empty):
        return load("verl.trainer.ppo.core_algos")
