"""`fastppo-train --explain CONFIG [key=value ...]`: each key's value, source, and meaning.

It reads only the configuration, without torch, model or data.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fastppo.config.effect import without_effect
from fastppo.config.elsewhere import IGNORED, OLD_NAMES, REFUSED
from fastppo.config.engine import TRL_IMPORTANCE
from fastppo.config.file import override, read_file
from fastppo.config.old_names import RENAMED
from fastppo.config.ppo import ALIASES
from fastppo.config.schema import STAGE_KEYS, Config, load_config, renamed

WIDTH = 100  # columns, if the output is no terminal
SECRET = ("token", "api_key")


class Line(NamedTuple):
    """The explanation of one key."""

    name: str
    value: str
    source: str  # file, command line or default
    meaning: str


def written(name: str, value: Any) -> str:
    """A value in YAML; secrets are not shown."""
    if value is not None and name.endswith(SECRET):
        return "***"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{inner}: {item}" for inner, item in value.items()) + "}"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value) if value != "" else "''"


def lines(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, list[Line]]:
    """The checked configuration, and a line for each key, first those that were set.

    Raises:
        UserError: a run with this file would raise the same error.
    """
    config = load_config(path, overrides)
    data = read_file(Path(path))
    touched = {override(data, text) for text in overrides}
    source = {name: "command line" if name in touched else "file" for name in data}
    # A key with two names is explained under the name that is used here.
    given, _ = renamed(data, config.source)
    today = {**ALIASES, **OLD_NAMES, **RENAMED, **TRL_IMPORTANCE}
    origins = {today.get(name, name): where for name, where in source.items()}
    set_lines = [
        explained(config, name, given[name], origins.get(name, "file"))
        for name in sorted(given, key=lambda name: origins.get(name, "file"))
    ]
    rest = [
        explained(config, name, None, "default")
        for name, field in Config.model_fields.items()
        if name not in given and field.description
    ]
    return config, set_lines + rest


def explained(config: Config, name: str, given: Any, source: str) -> Line:
    """The explanation of one key: a setting, or a key that has no effect here."""
    field = Config.model_fields.get(name)
    if field is None:
        if name in REFUSED:
            meaning = "Nothing with this value; another one is refused."
        else:
            reason = IGNORED.get(name) or "it is unknown (ALLOW_EXTRA_ARGS)"
            meaning = f"Nothing: {reason}."
        return Line(name, written(name, given), source, meaning)
    meaning = field.description or ""
    other = "rm" if config.stage == "ppo" else "ppo"
    if name in STAGE_KEYS[other]:
        meaning = f"Nothing in stage {config.stage}. In {other}: {meaning}"
    elif name in (here := without_effect(config)):
        meaning = f"Here {here[name]}. Elsewhere: {meaning}"
    elif config.stage == "ppo" and name in config.unknown_to_estimator:
        meaning = f"Nothing to advantage: {config.advantage}. Elsewhere: {meaning}"
    value = getattr(config, name)
    if source == "default" and name in config.model_fields_set:
        source = "lf_sampling"  # it sets sampling keys that the file does not set
    return Line(name, written(name, value), source, meaning)


def page(config: Config, explained_lines: Sequence[Line]) -> Iterator[Table | str]:
    """What is printed: first a heading, then the table."""
    given = [line for line in explained_lines if line.source in ("file", "command line")]
    left = len(explained_lines) - len(given)
    yield (
        f"{config.source}: stage {config.stage}, {len(given)} keys set, {left} at their default, "
        f"{len(config.ignored)} without effect"
    )
    yield from config.remarks
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold", max_width=20)
    table.add_column("from", no_wrap=True)
    table.add_column("what it does here", ratio=1)
    for line in explained_lines:
        style = None if line.source == "default" else "bold"
        table.add_row(line.name, line.value, line.source, line.meaning, style=style)
    yield table


class Printer(Console):
    """A console that leaves it to the command what happens if the reader of its text is gone."""

    def on_broken_pipe(self) -> None:
        """Raise what rich would turn into an exit code of 1."""
        raise BrokenPipeError


def run(path: str | Path, overrides: Sequence[str] = ()) -> int:
    """Print the page; returns the exit code."""
    config, found = lines(path, overrides)
    width = None if sys.stdout.isatty() else WIDTH
    console = Printer(highlight=False, width=width, markup=False)
    for part in page(config, found):
        console.print(part)
    return 0
