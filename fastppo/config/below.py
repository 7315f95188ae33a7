"""Adapters that were merged into the base of another adapter. This module imports no torch.

With `create_new_adapter`, earlier adapters are merged into the base before training. The new
adapter is correct only on that merged base, so both stages record the earlier adapters in a file
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastppo.config.file import read_json
from fastppo.config.rewards import BASE_RECORD, RECORD
from fastppo.errors import UserError

ADAPTER = "adapter_config.json"


def adapters_below(folder: Path) -> list[str]:
    """The adapters that were merged into the base before the one in `folder` was trained."""
    for name in (RECORD, BASE_RECORD):
        path = folder / name
        if path.is_file():
            found = read_json(path).get("merged", [])
            return [str(item) for item in found] if isinstance(found, list) else []
    return []


def base_of(folder: Path) -> str | None:
    """The base model that is named in the adapter's own config, or None."""
    path = folder / ADAPTER
    name = read_json(path).get("base_model_name_or_path") if path.is_file() else None
    return str(name) if name else None


def is_same(one: str, other: str) -> bool:
    """Whether two names mean the same folder, or the same repository on the hub."""
    return one == other or Path(one).resolve() == Path(other).resolve()


def missing_below(adapters: Sequence[str]) -> tuple[str, list[str]] | None:
    """The first of `adapters` that does not follow the adapters it was trained on, and those.

    None if there is no such adapter. Adapters are compared by the names of their folders, because
    they may have been moved.
    """
    for place, name in enumerate(adapters):
        below = adapters_below(Path(name))
        before = list(adapters[:place])[-len(below) :] if below else []
        if [Path(item).name for item in before] != [Path(item).name for item in below]:
            return name, below
    return None


def check_below(source: str, key: str, base: str, adapters: Sequence[str]) -> None:
    """Raise UserError if an adapter's record says that it was trained on another base.

    Args:
        source: the configuration file, for the error.
        key: the setting that names the adapters.
        base: the model that the adapters are put on.
        adapters: in the order in which they are merged.
    """
    found = missing_below(adapters)
    if found is not None:
        name, below = found
        record = next(x for x in (RECORD, BASE_RECORD) if (Path(name) / x).is_file())
        raise UserError(
            f"{source}: {key}: {name} was trained on {base_of(Path(name)) or base} with "
            f"{', '.join(below)} merged into it, and is wrong without; write {key}: "
            f"{','.join([*below, name])}, or delete {Path(name) / record} where {base} is a model "
            "that has it merged already"
        )
