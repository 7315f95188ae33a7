"""Read the raw rows of a file, a folder of files, or a data set on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.config import downloads
from fastppo.data.info import PACKED, READERS, Source, unread
from fastppo.errors import UserError

if TYPE_CHECKING:
    from fastppo.config import Config


@dataclass(frozen=True)
class Row:
    """A row of a file, and its position."""

    where: str  # file and row number, for errors
    content: Any  # the parsed row, usually a dict; NotJson if it could not be parsed


class NotJson(str):
    """The parser's message for a line that is not JSON; it replaces the line's content."""


def read_rows(source: Source, config: Config) -> Iterator[Row]:
    """The rows of a data set, in order.

    JSON is parsed here, other types by `datasets`. That library makes a table, so that one JSON row
    of another shape would make the whole file unreadable; here only that row is dropped.
    """
    path = source.path
    if path is None:
        return load_with_datasets(str(source.hub), None, source, config)
    files = list_files(path)
    for file in files:
        if file.suffix.lower() in PACKED:
            raise UserError(f"{file} {unread(file)}")
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
    return load_with_datasets(reader, [str(file) for file in files], source, config)


def list_files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder, sorted by name and without hidden ones."""
    if not path.is_dir():
        return [path]
    return sorted(x for x in path.iterdir() if x.is_file() and not x.name.startswith("."))


def read_json(path: Path) -> Iterator[Row]:
    """Rows of a JSON file: a list, or one row per line; with or without a byte order mark."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if not text.lstrip().startswith("["):
        check_lines(text, path)
        yield from read_lines(text, path)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON, line {error.lineno}: {why_not(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); mend it") from None
    for number, row in enumerate(rows, 1):
        yield Row(f"{path} row {number}", row)


def why_not(error: json.JSONDecodeError) -> str:
    """The parser's message and the cure; in plainer words for a comma with nothing behind it."""
    before = error.doc[: error.pos].rstrip()
    if before.endswith(",") and error.doc[error.pos :].lstrip()[:1] in ("]", "}"):
        return "a comma with nothing behind it; take it out"
    return f"{error.msg}; mend the line"


def check_lines(text: str, path: Path) -> None:
    """Refuse JSON that is neither a list nor a value a line: an object over several lines."""
    start = text.lstrip()
    if not start.startswith("{"):
        return
    try:
        first, end = json.JSONDecoder().raw_decode(start)
    except (ValueError, RecursionError):
        return  # a torn line, which costs its row alone
    if "\n" not in start[:end]:
        return
    inner = [name for name, value in first.items() if isinstance(value, list)]
    if start[end:].strip():
        cure = (
            "put all of them into one list: [ before the first, ] behind the last, commas between"
        )
    elif inner:
        cure = f"write the list of rows alone, which may be what is in '{inner[0]}'"
    else:
        cure = "put [ before it and ] behind it where it is a row"
    raise UserError(
        f"{path}: neither a list nor an object a line: it begins with an object over several "
        f"lines; {cure}"
    )


def read_lines(text: str, path: Path) -> Iterator[Row]:
    """Rows of a file with one JSON value per line; a line that is not JSON becomes a bad row."""
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


def load_with_datasets(
    reader: str, files: list[str] | None, source: Source, config: Config
) -> Iterator[Row]:
    """Rows read by `datasets`: from `files` with the builder `reader`, or from the hub."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    # Errors become one line below; the libraries should not log them too.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    hub_logging.set_verbosity(hub_logging.CRITICAL)
    settings: dict[str, Any] = {"data_files": files}
    why = None
    if files is None:
        why = downloads.check_dataset(f"{config.source}: data set:", reader)
        settings = {"name": source.info.get("subset"), "data_dir": source.info.get("folder")}
    elif reader in ("csv", "text"):
        settings["encoding"] = "utf-8-sig"  # with or without a byte order mark
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or why is not None  # otherwise it asks six times
    try:
        if files and reader == "csv":
            settings |= as_text(files)
        table = datasets.load_dataset(
            reader, split=source.split, cache_dir=config.cache_dir, **settings
        )
    except Exception as error:  # `datasets` can raise anything; the file or the name is wrong
        said = (str(error) or type(error).__name__).splitlines()[0]
        place = source.path or f"'{reader}' on the Hugging Face hub"
        cure = "mend or replace it" if files else "check the name"
        if why is not None:
            said = f"it is not in the cache of `datasets`, and {why}"
            cure = f"fetch it where there is a network, or name a local file{downloads.MIRROR}"
        raise UserError(f"{place}: cannot be read ({said}); {cure}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    name = source.path or reader
    return (Row(f"{name} row {number}", dict(row)) for number, row in enumerate(table, 1))


def as_text(files: list[str]) -> dict[str, Any]:
    """Settings with which every column of these CSV files is text: a CSV knows no types.

    Left to itself, pandas makes numbers of some columns, and nothing of "NA" or "None".
    """
    import datasets
    import pandas

    names = pandas.read_csv(files[0], nrows=0, encoding="utf-8-sig").columns
    features = datasets.Features({str(name): datasets.Value("string") for name in names})
    return {"features": features, "keep_default_na": False}
