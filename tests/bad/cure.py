"""What a user makes of an error line: the case with the advice of its line followed once.

Lines that advise in a form of their own (`leave it out`, `did you mean 'x'?`, `use key: value`) are
followed as they are written; cured.yaml has what a user would do about others.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import yaml

from fastppo.config import Config
from tests.bad import FOLDER, Case, table

FIELDS = {"keys", "entry", "files", "without", "heads", "folders"}


def written_cures() -> dict[tuple[str, str], dict[str, Any]]:
    """Area and wrong -> the fields of the case that the user changes."""
    found = table(FOLDER / "cured.yaml")
    return {(area, wrong): cure for area, cures in found.items() for wrong, cure in cures.items()}


def cured(case: Case, written: dict[tuple[str, str], dict[str, Any]]) -> Case | None:
    """The case after its line's advice was followed; None where that takes more than the file."""
    changes = written.get((case.area, case.wrong))
    if changes is not None:
        assert set(changes) <= FIELDS
        return dataclasses.replace(case, **changes)
    keys = followed(case.keys, case.line)
    return None if keys is None else dataclasses.replace(case, keys=keys)


def followed(keys: dict[str, Any], line: str) -> dict[str, Any] | None:
    """The keys with the line's advice followed; None where it has no form that is known here."""
    line = line.removeprefix("run.yaml: ")
    unknown = re.match(r"unknown key '(\w+)'", line)
    name = unknown[1] if unknown else line.partition(":")[0]
    if name not in keys:
        return None
    rest = {key: value for key, value in keys.items() if key != name}
    if found := re.search(r"did you mean '?(\w+)'?\?$", line):
        return {**rest, found[1]: keys[name]} if unknown else {**rest, name: found[1]}
    if found := re.search(r"; here that is (\w+)", line):
        return {**rest, found[1]: keys[name]}
    if found := re.search(r"is none of (\w+)[^;]*; choose one of them$", line):
        return {**rest, name: yaml.safe_load(found[1])}
    if re.search(rf"(leave|take) (it|{name}) out|keep one( of the two)?$", line):
        return rest
    found = re.search(r"(?:use|set) (\w+): ([\w.-]+)", line)
    if found and found[1] in Config.model_fields:
        kept = rest if "not supported" in line else keys
        return {**kept, found[1]: yaml.safe_load(found[2])}
    return None
