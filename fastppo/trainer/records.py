"""Data sets as objects: `datasets.Dataset`, or rows as dictionaries, with text, turns or tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastppo.data.files import Row
from fastppo.data.info import Source
from fastppo.data.records import DroppedRows, Record, kind_of, to_records
from fastppo.errors import UserError, note

SOURCE = "PPOTrainer"


def read_rows(dataset: Any, argument: str) -> list[dict[str, Any]]:
    """The rows of a data set; `argument` names it in errors."""
    if isinstance(dataset, Mapping):
        raise UserError(
            f"{SOURCE}: {argument}: is several sets by name; give one, for example by "
            "datasets.concatenate_datasets"
        )
    if isinstance(dataset, str | bytes) or not isinstance(dataset, Iterable):
        raise UserError(
            f"{SOURCE}: {argument}: is {kind_of(dataset)}; give a datasets.Dataset or a list of "
            "dictionaries, for example datasets.load_dataset(...)"
        )
    if not hasattr(dataset, "__len__"):
        raise UserError(
            f"{SOURCE}: {argument}: is a stream, and data is read whole; give a list, for example "
            "list(dataset.take(1000))"
        )
    rows = list(dataset)
    if not rows:
        raise UserError(f"{SOURCE}: {argument}: has no rows; add some")
    for row in rows:
        if not isinstance(row, Mapping):
            raise UserError(
                f"{SOURCE}: {argument}: a row is {kind_of(row)}, not a dictionary; write for "
                'example {"prompt": "Say hello"}'
            )
    return [dict(row) for row in rows]


def make_records(dataset: Any, argument: str, tokenizer: Any, template: str | None) -> list[Record]:
    """The records of a data set, by its columns.

    | column      | what it holds                                                              |
    |-------------|----------------------------------------------------------------------------|
    | `input_ids` | the prompt's token ids, as TRL's PPOTrainer takes them                       |
    | `prompt`    | text, which the policy continues; with `template` it is a user's turn        |
    | `prompt`    | messages (role, content), formatted by the chat template                     |
    | `messages`  | messages; an answer at the end is shown with samples                         |

    Anything else is read as a file is: alpaca, or sharegpt by its `conversations`.
    """
    rows = read_rows(dataset, argument)
    first = rows[0]
    if "input_ids" in first:
        return from_ids(rows, argument, tokenizer)
    if isinstance(first.get("prompt"), str):
        info: dict[str, Any] = {"columns": {"prompt": "prompt"}}
        records = convert(rows, argument, info)
        return records if template is not None else [continued(r, tokenizer) for r in records]
    for column in ("prompt", "messages", "conversations"):
        if column in first:
            kind = "sharegpt" if column == "conversations" else "openai"
            return convert(rows, argument, {"formatting": kind, "columns": {"messages": column}})
    if "instruction" in first:
        return convert(rows, argument, {})
    raise UserError(
        f"{SOURCE}: {argument}: has columns {', '.join(first) or 'none'}; it needs prompt (text "
        "or messages), messages, or input_ids"
    )


def convert(rows: Sequence[dict[str, Any]], argument: str, info: dict[str, Any]) -> list[Record]:
    """Rows in a format of dataset_info.json as records; bad rows are dropped with a note."""
    dropped = DroppedRows(argument)
    numbered = [Row(f"{argument} row {i}", row) for i, row in enumerate(rows, 1)]
    records = to_records(numbered, Source(argument, info), dropped)
    if (line := dropped.note()) is not None:
        note(line)
    return records


def continued(record: Record, tokenizer: Any) -> Record:
    """The record of a text that the policy continues: its tokens, with the tokenizer's own BOS."""
    return replace(record, ids=list(tokenizer(record.messages[-1]["content"])["input_ids"]))


def from_ids(rows: Sequence[dict[str, Any]], argument: str, tokenizer: Any) -> list[Record]:
    """The records of prompts that are token ids; `attention_mask` says which are padding."""
    records = []
    for number, row in enumerate(rows, 1):
        where = f"{argument} row {number}"
        ids = row["input_ids"]
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise UserError(f"{SOURCE}: {where}: input_ids is no list of token ids; mend it")
        mask = row.get("attention_mask")
        if mask is not None:
            mask = mask.tolist() if hasattr(mask, "tolist") else mask
            ids = [token for token, live in zip(ids, mask, strict=True) if live]
        if not ids:
            raise UserError(f"{SOURCE}: {where}: input_ids is empty; take the row out")
        text = row.get("query", row.get("prompt"))  # as TRL's examples name it
        if not isinstance(text, str):
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
        columns = {k: v for k, v in row.items() if k not in ("input_ids", "attention_mask")}
        turn = [{"role": "user", "content": text}]
        records.append(Record(turn, where, columns=columns, ids=ids))
    return records


def is_conversational(dataset: Any) -> bool:
    """Whether reward functions get messages, as TRL's do: `prompt` is a list of them."""
    can_be_read_twice = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    first = next(iter(dataset), None) if can_be_read_twice else None
    return isinstance(first, Mapping) and isinstance(first.get("prompt"), list)
