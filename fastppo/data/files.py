"""Raw rows of a file, a folder of files or a hub's data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.data.info import READERS, Source
from fastppo.errors import UserError

if TYPE_CHECKING:
    from fastppo.config import Config


@dataclass(frozen=True)
class Row:
    """A row, and where it stands; `content` is what JSON held, or the complaint about it."""

    where: str
    content: Any


class NotJson(str):
    """A line that is no JSON: what the parser says of it."""


def read_rows(source: Source, config: Config) -> Iterator[Row]:
    """The rows, in order.

    JSON is read by Python's own parser and the rest by `datasets`: that reads a table, in which one
    row of another shape spoils the whole file, and here such a row is dropped and the rest read.
    """
    path = source.path
    if path is None:
        return load(str(source.hub), None, source, config)
    files = list_files(path)
    kinds = {file.suffix.lower().removeprefix(".") for file in files}
    if not kinds <= set(READERS) or not kinds:
        raise UserError(
            f"{path}: holds no json, jsonl, csv, parquet, arrow or txt file; check file_name"
        )
    readers = {READERS[kind] for kind in kinds}
    if len(readers) > 1:
        raise UserError(
            f"{path}: holds {', '.join(sorted(kinds))} files; a data set has files of one type"
        )
    (reader,) = readers
    if reader == "json" and source.split == "train":
        return (row for file in files for row in read_json(file))
    return load(reader, [str(file) for file in files], source, config)


def list_files(path: Path) -> list[Path]:
    """A file, or the files of a folder by name; hidden ones are the system's."""
    if not path.is_dir():
        return [path]
    return sorted(x for x in path.iterdir() if x.is_file() and not x.name.startswith("."))


def read_json(path: Path) -> Iterator[Row]:
    """A list of rows, or a row a line; UTF-8 with or without a byte order mark."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if not text.lstrip().startswith("["):
        yield from read_lines(text, path)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not JSON, line {error.lineno}: {error.msg}; mend the line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); mend it") from None
    for number, row in enumerate(rows, 1):
        yield Row(f"{path} row {number}", row)


def read_lines(text: str, path: Path) -> Iterator[Row]:
    """Rows of JSON lines; a torn line is a bad row."""
    number = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        number += 1
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = NotJson(getattr(error, "msg", error))
        yield Row(f"{path} row {number}", row)


def load(reader: str, files: list[str] | None, source: Source, config: Config) -> Iterator[Row]:
    """Rows through `datasets`."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    # Errors are raised and said in one line here; their own logs would say them a second time.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    hub_logging.set_verbosity(hub_logging.CRITICAL)
    how: dict[str, Any] = {"data_files": files}
    if files is None:
        how = {"name": source.info.get("subset"), "data_dir": source.info.get("folder")}
    elif reader in ("csv", "text"):
        how["encoding"] = "utf-8-sig"  # with or without a byte order mark
    try:
        table = datasets.load_dataset(reader, split=source.split, cache_dir=config.cache_dir, **how)
    except Exception as error:  # whatever `datasets` raises, the user can mend the file or the name
        why = (str(error) or type(error).__name__).splitlines()[0]
        place = source.path or f"'{reader}' on the Hugging Face hub"
        cure = "mend or replace it" if files else "check the name and the network"
        raise UserError(f"{place}: cannot be read ({why}); {cure}") from None
    name = source.path or reader
    return (Row(f"{name} row {number}", dict(row)) for number, row in enumerate(table, 1))
