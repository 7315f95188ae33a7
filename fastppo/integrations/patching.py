"""Which versions of the other packages were tried, and how a name in them is replaced."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

TRIED: Final = {
    "trl": "1.16.0",
    "verl": "0.9.1",
    "openrlhf": "0.11.2",
    "liger-kernel": "0.8.5",
}


def check_version(package: str) -> None:
    """Warn where the installed version is not the one that was tried; the warning names both."""
    try:
        installed = version(package)
    except PackageNotFoundError:  # a source tree on the path
        installed = "of an unknown version"
    if installed != TRIED[package]:
        warnings.warn(
            f"fastppo.integrations was tried with {package} {TRIED[package]}; "
            f"{installed} is installed, and may call these functions differently",
            stacklevel=3,
        )


def replace(package: str, name: str, old: Any, new: Any) -> None:
    """Put `new` in the place of `old` in every loaded module of a package that has imported it."""
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == package and vars(module).get(name) is old:
            setattr(module, name, new)
