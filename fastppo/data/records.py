"""Convert rows in alpaca, sharegpt or openai format to records; bad rows are dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastppo.data.files import NotJson, Row
from fastppo.data.info import Source
from fastppo.errors import UserError

if TYPE_CHECKING:
    from fastppo.templates import Message

ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
MESSAGES = {"sharegpt": "conversations", "openai": "messages"}
TAGS = {
    "sharegpt": {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
        "system_tag": "system",
    },
    "openai": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "function_tag": "function",
        "system_tag": "system",
    },
}
SHOWN = 3  # number of bad rows that are shown; the others are only counted
NO_TOOLS = "tool calls are not supported"


@dataclass(frozen=True)
class Record:
    """A row of any format as a conversation that ends with a question, and its answers."""

    messages: list[Message]
    where: str  # file and row, for errors
    system: str | None = None
    response: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    ids: list[int] | None = None  # the prompt's token ids, where it came as such


class BadRow(Exception):
    """A row is dropped; the message says why."""


class NotDescribed(BadRow):
    """A row has other names of columns or roles than its description in dataset_info.json."""


class MissingColumn(NotDescribed):
    """A row has no such column; the message says which it has, by which a wrong name is seen."""

    def __init__(self, column: str | None, row: dict[str, Any]) -> None:
        others = ", ".join(str(name)[:30] for name in list(row)[:6] if name != column)
        super().__init__(f"has no '{column}'" + (f", it has {others}" if others else ""))


@dataclass
class DroppedRows:
    """Counts the bad rows of a source, and stores the first of them for a note."""

    source: str  # file, hub name or setting to correct
    cure: str = ""  # the setting that keeps them, if there is one
    seen: int = 0  # number of rows read
    bad: int = 0  # number of rows dropped
    described: bool = True  # False: columns or roles have other names than dataset_info.json says
    first: list[tuple[str, str]] = field(default_factory=list)  # where and why, of the first SHOWN

    def add(self, where: str, why: object) -> None:
        """Count a bad row; store its position and the reason if it is one of the first."""
        self.bad += 1
        self.described &= not isinstance(why, NotDescribed)
        if len(self.first) < SHOWN:
            # The note names the file once; with several files, each row names its own.
            self.first.append((where.removeprefix(self.source).strip(), str(why)))

    def note(self) -> str | None:
        """A line about the dropped rows, or None if none were; raises UserError if most were."""
        if not self.bad:
            return None
        reasons = dict.fromkeys(why for _, why in self.first)  # each once, in order
        rows = "; ".join(
            f"{', '.join(where for where, other in self.first if other == why)}: {why}"
            for why in reasons
        ) + ("; ..." if self.bad > SHOWN else "")
        counted = f"{self.source}: {self.bad} of {self.seen} rows are bad"
        if 2 * self.bad > self.seen:
            mend = "mend them"
            if not self.described:
                mend += ", or describe them in dataset_info.json (docs/data.md)"
            raise UserError(f"{counted} ({rows}); {self.cure or mend}")
        return f"{counted} and dropped ({rows})" + (f"; {self.cure}" if self.cure else "")


def to_records(
    rows: Iterable[Row], source: Source, dropped: DroppedRows, limit: int | None = None
) -> list[Record]:
    """At most `limit` valid rows as records; bad rows are counted in `dropped`."""
    records: list[Record] = []
    read = reader_of(source)
    for row in rows:
        if limit is not None and len(records) >= limit:
            break
        dropped.seen += 1
        try:
            if isinstance(row.content, NotJson):
                raise BadRow(f"not JSON ({row.content})")
            if not isinstance(row.content, dict):
                raise BadRow(f"is {kind_of(row.content)}, not an object")
            records.append((read_preference if in_messages(row, source) else read)(row, source))
        except BadRow as why:
            dropped.add(row.where, why)
    return records


def reader_of(source: Source) -> Callable[[Row, Source], Record]:
    """The function that converts a row of the source's format."""
    return read_alpaca if source.info.get("formatting", "alpaca") == "alpaca" else read_turns


def in_messages(row: Row, source: Source) -> bool:
    """Whether a pair's answers are lists of messages, as in TRL's preference format."""
    column = (source.info.get("columns") or {}).get("chosen") or "chosen"
    return source.ranking and isinstance(row.content.get(column), list)


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    words = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return words.get(type(value), f"a {type(value).__name__}")


def text_of(row: dict[str, Any], column: str | None, *, needed: bool = False) -> str | None:
    """The text in a column; None if it is absent or empty.

    Raises:
        BadRow: the column is not text, or with `needed` it is absent or blank.
    """
    value = row.get(column) if column else None
    if value is None or value == "":
        if needed:
            raise BadRow(f"'{column}' is blank") if value == "" else MissingColumn(column, row)
        return None
    if not isinstance(value, str):
        raise BadRow(f"'{column}' is {kind_of(value)}, not text")
    if value.encode("utf-8", "ignore").decode() != value:
        raise BadRow(f"'{column}' holds half a character")
    if needed and not value.strip():
        raise BadRow(f"'{column}' is blank")
    return value


def refuse_tools(row: dict[str, Any], column: str | None) -> None:
    """Raise BadRow for a row with tools in `column`: tool calls are not supported."""
    if column and row.get(column) not in (None, "", "[]", []):
        raise BadRow(f"has '{column}', and {NO_TOOLS}")


def read_alpaca(row: Row, source: Source) -> Record:
    """The record of an alpaca row.

    The question is instruction and input, joined by a line break; the answer is output, or in a
    pair chosen and rejected.
    """
    content: dict[str, Any] = row.content
    columns = source.info.get("columns") or ALPACA_COLUMNS
    refuse_tools(content, columns.get("tools"))
    parts = [text_of(content, columns.get(name)) for name in ("prompt", "query")]
    question = "\n".join(part for part in parts if part)
    if not question.strip():
        column = columns.get("prompt", columns.get("query", "instruction"))
        if question or content.get(column) == "":
            raise BadRow(f"'{column}' is blank")
        raise MissingColumn(column, content)
    messages = read_history(content.get(columns.get("history", "")))
    messages.append({"role": "user", "content": question})
    answers: dict[str, str | None] = {}
    if source.ranking:
        for name in ("chosen", "rejected"):
            answers[name] = text_of(content, columns.get(name) or name, needed=True)
    elif isinstance(content.get(columns.get("response", "")), str):
        # An output that is not text is for reward functions, which get all columns, not an answer.
        answers["response"] = text_of(content, columns.get("response"))
    system = text_of(content, columns.get("system"))
    return Record(messages, row.where, system=system, columns=content, **answers)


def read_history(history: Any) -> list[Message]:
    """The messages of earlier turns, from a list of [question, answer]."""
    messages: list[Message] = []
    for turn in (history if isinstance(history, list) else [history]) if history else []:
        if not isinstance(turn, list) or [type(part) for part in turn] != [str, str]:
            raise BadRow("history is not a list of [question, answer]")
        if any(part.encode("utf-8", "ignore").decode() != part for part in turn):
            raise BadRow("history holds half a character")
        messages += [
            {"role": "user", "content": turn[0]},
            {"role": "assistant", "content": turn[1]},
        ]
    return messages


def read_turns(row: Row, source: Source) -> Record:
    """The record of a sharegpt or openai row, in which turns of user and assistant alternate.

    If the last turn is the assistant's, it is the answer. A pair has its two answers in columns.
    """
    content: dict[str, Any] = row.content
    kind = source.info["formatting"]
    columns = source.info.get("columns") or {"messages": MESSAGES[kind]}
    tags = TAGS[kind] | (source.info.get("tags") or {})
    refuse_tools(content, columns.get("tools"))
    name = columns["messages"]
    turns = content.get(name)
    if turns == []:
        raise BadRow(f"'{name}' is empty")
    if not isinstance(turns, list):
        raise MissingColumn(name, content)
    messages = [read_turn(turn, tags) for turn in turns]
    system = text_of(content, columns.get("system"))
    if messages[0]["role"] == "system":
        system = messages.pop(0)["content"] or None
    response = None
    if messages and messages[-1]["role"] == "assistant" and not source.ranking:
        response = messages.pop()["content"]
    check_order(messages)
    answers: dict[str, str | None] = {}
    if source.ranking:
        for name in ("chosen", "rejected"):
            turn = content.get(columns.get(name) or name)
            if not isinstance(turn, dict):
                raise BadRow(f"has no '{columns.get(name) or name}' with a role and a text")
            answer = read_turn({tags["role_tag"]: tags["assistant_tag"], **turn}, tags)
            if answer["role"] != "assistant":
                raise BadRow(f"'{columns.get(name) or name}' is the {answer['role']}'s")
            answers[name] = answer["content"]
    return Record(messages, row.where, system=system, response=response, columns=content, **answers)


def check_order(messages: list[Message]) -> None:
    """Raise BadRow unless user and assistant alternate, from a question to a question."""
    order = [message["role"] for message in messages]
    if order != ["user", "assistant"] * (len(order) // 2) + ["user"]:
        raise BadRow(
            f"turns are {', '.join(order) or 'none'}; user and assistant must alternate, and the "
            "last question must be the user's"
        )


def read_preference(row: Row, source: Source) -> Record:
    """The record of a pair in TRL's preference format, whose answers are lists of messages.

    With an explicit prompt its messages stand in a column of their own (`prompt`). With an implicit
    one both lists begin with them: the prompt is what they have in common. As in TRL, a prompt that
    is text beside such lists is not read, unless they have nothing in common.
    """
    content: dict[str, Any] = row.content
    kind = source.info.get("formatting", "alpaca")
    columns = source.info.get("columns") or {}
    tags = TAGS["openai" if kind == "alpaca" else kind] | (source.info.get("tags") or {})
    refuse_tools(content, columns.get("tools"))
    names = {name: columns.get(name) or name for name in ("chosen", "rejected")}
    turns: dict[str, list[Message]] = {}
    for name, column in names.items():
        if not isinstance(content.get(column), list) or not content[column]:
            kind = kind_of(content.get(column)) if content.get(column) != [] else "empty"
            raise BadRow(f"'{column}' is {kind}, and must be a list of messages like the other")
        turns[name] = [read_turn(turn, tags) for turn in content[column]]
    prompt = content.get(columns.get("messages") or columns.get("prompt") or "prompt")
    messages = [read_turn(turn, tags) for turn in prompt] if isinstance(prompt, list) else []
    shared = 0  # an answer is left where both lists are equal
    for one, other in zip(turns["chosen"][:-1], turns["rejected"][:-1], strict=False):
        if one != other:
            break
        shared += 1
    messages += turns["chosen"][:shared]
    if not messages and isinstance(prompt, str) and prompt.strip():
        messages = [{"role": "user", "content": prompt}]
    system = text_of(content, columns.get("system"))
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"] or None
    if not messages:
        raise BadRow(f"has no prompt, and '{names['chosen']}' begins otherwise than the other")
    check_order(messages)
    answers = {}
    for name, column in names.items():
        after = turns[name][shared:]
        if [turn["role"] for turn in after] != ["assistant"]:
            roles = ", ".join(turn["role"] for turn in after)
            raise BadRow(f"'{column}' has {roles} after the prompt, and must have one assistant's")
        answers[name] = after[0]["content"]
    return Record(messages, row.where, system=system, columns=content, **answers)


def read_turn(turn: Any, tags: dict[str, str]) -> Message:
    """One turn as a message; `tags` are the names of its keys and roles in dataset_info.json."""
    roles = {tags[f"{role}_tag"]: role for role in ("user", "assistant", "system")}
    speaker = str(turn.get(tags["role_tag"])) if isinstance(turn, dict) else None
    tools = {tags["observation_tag"], tags["function_tag"]}
    if speaker in tools - set(roles) or (isinstance(turn, dict) and turn.get("tool_calls")):
        raise BadRow(f"has a turn by '{speaker}', and {NO_TOOLS}")
    if speaker not in roles:
        raise NotDescribed(f"a turn by nobody known ({turn!r:.60}); it needs {list(roles)}")
    # Sets with a system turn in every row leave it empty where there is no system prompt.
    needed = roles[speaker] != "system"
    text = text_of(turn, tags["content_tag"], needed=needed)
    return {"role": roles[speaker], "content": text or ""}
