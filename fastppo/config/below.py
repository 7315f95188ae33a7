"""Adapters that are part of the base that another adapter was trained on. No torch here.

With `create_new_adapter` earlier adapters are merged into the base before training, and what is
saved is right on that base alone. Both stages record the earlier ones beside the new adapter.
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
    """The base that the adapter in `folder` names, or None."""
    path = folder / ADAPTER
    name = read_json(path).get("base_model_name_or_path") if path.is_file() else None
    return str(name) if name else None


def is_same(one: str, other: str) -> bool:
    """Whether two names mean one folder, or one repository on the hub."""
    return one == other or Path(one).resolve() == Path(other).resolve()


def missing_below(adapters: Sequence[str]) -> tuple[str, list[str]] | None:
    """The first of `adapters` that lacks those it was trained on top of, and these; else None.

    An earlier adapter that was moved is known by its folder's name.
    """
    for place, name in enumerate(adapters):
        below = adapters_below(Path(name))
        before = list(adapters[:place])[-len(below) :] if below else []
        if [Path(item).name for item in before] != [Path(item).name for item in below]:
            return name, below
    return None


def check_below(source: str, key: str, base: str, adapters: Sequence[str]) -> None:
    """Refuse adapters on another base than they were trained on, as far as that is recorded.

    Args:
        source: the file, for the error.
        key: the setting that names the adapters.
        base: the model they go on.
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
