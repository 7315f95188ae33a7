"""Records as LLaMA-Factory's `dataset_info.json` names them, and their encoding.

Reading needs neither torch nor a tokenizer, so that bad data is refused at once.
"""

from __future__ import annotations

import difflib
import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.errors import UserError
from fastppo.types import Pair, Prompt

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.templates import Message, Template

ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
}


@dataclass(frozen=True)
class Record:
    """One row, whatever its file's format: a conversation up to a question, and answers."""

    messages: list[Message]
    where: str  # file and row, for errors
    system: str | None = None
    response: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Records:
    """What a run trains on, and what it holds out."""

    train: list[Record]
    eval: list[Record]


@dataclass(frozen=True)
class Source:
    """A data set as dataset_info.json describes it."""

    name: str
    path: Path | None  # None: on the hub
    info: dict[str, Any]
    plain: bool = False  # named by its path, with nothing said of it

    @property
    def ranking(self) -> bool:
        return bool(self.info.get("ranking", False))


def read_records(config: Config) -> Records:
    """Everything that `dataset` and `eval_dataset` name, checked for the stage."""
    train = read_sets(config, config.dataset, "dataset")
    if config.eval_dataset:
        return Records(train, read_sets(config, config.eval_dataset, "eval_dataset"))
    if not config.val_size:
        return Records(train, [])
    count = config.val_size if config.val_size >= 1 else config.val_size * len(train)
    count = max(1, int(count))
    if count >= len(train):
        raise UserError(
            f"{config.source}: val_size: holds out {count} of {len(train)} records and leaves "
            f"none to "
            "train on; lower it"
        )
    order = list(range(len(train)))
    random.Random(config.seed).shuffle(order)
    held = set(order[:count])
    return Records(
        [record for i, record in enumerate(train) if i not in held],
        [train[i] for i in sorted(held)],
    )


def read_sets(config: Config, names: str, key: str) -> list[Record]:
    """The records of a comma list of data sets, one after the other."""
    records: list[Record] = []
    for name in names.split(","):
        source = find_source(config, name.strip(), key)
        gate(config, source)
        rows = read_rows(source, config)
        if config.max_samples is not None:
            rows = rows[: config.max_samples]
        if (
            source.plain
            and config.stage == "ppo"
            and rows
            and {"chosen", "rejected"} <= set(rows[0])
        ):
            gate(config, replace(source, info={"ranking": True}))
        read = read_sharegpt if source.info.get("formatting") == "sharegpt" else read_alpaca
        found = [
            read(row, f"{source.path or name} row {i}", source) for i, row in enumerate(rows, 1)
        ]
        if not found:
            raise UserError(
                f"{config.source}: {key}: '{name}' ({source.path}) has no records; add some"
            )
        records += found
    return records


def gate(config: Config, source: Source) -> None:
    """Pairs train reward models, prompts train policies."""
    if config.stage == "rm" and not source.ranking:
        raise UserError(
            f"{config.source}: dataset: stage rm learns from pairs, and '{source.name}' is not "
            f"marked "
            '"ranking": true in dataset_info.json; name a set of pairs (chosen, rejected)'
        )
    if config.stage == "ppo" and source.ranking:
        raise UserError(
            f"{config.source}: dataset: stage ppo learns from prompts, and '{source.name}' is a "
            f"set of "
            'pairs ("ranking": true); name a set of prompts, or use stage: rm'
        )


def find_source(config: Config, name: str, key: str) -> Source:
    """The entry of dataset_info.json, or a path that is plainly one."""
    direct = Path(name)
    if direct.suffix in (".json", ".jsonl"):
        if not direct.is_file():
            raise UserError(f"{config.source}: {key}: no file {name}; check the path")
        return Source(name, direct, {"ranking": config.stage == "rm"}, plain=True)
    folder = Path(config.dataset_dir)
    info_path = folder / "dataset_info.json"
    if not info_path.is_file():
        raise UserError(
            f"{config.source}: dataset_dir: no {info_path}; set dataset_dir to the folder that "
            f"has it"
        )
    try:
        infos = json.loads(info_path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{info_path}: not JSON ({error}); mend it") from None
    if not isinstance(infos, dict):
        raise UserError(f"{info_path}: is not an object of data sets by name; mend it")
    if name not in infos:
        near = difflib.get_close_matches(name, infos, n=1, cutoff=0.5)
        cure = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(list(infos)[:8])}"
        raise UserError(f"{config.source}: {key}: {info_path} names no '{name}'; {cure}")
    info = infos[name]
    check_entry(info, f"{info_path}: '{name}'")
    if "file_name" not in info:
        if "hf_hub_url" in info:
            return Source(name, None, info)
        raise UserError(f"{info_path}: '{name}' has no file_name; add one")
    path = folder / info["file_name"]
    if not path.exists():
        raise UserError(f"{info_path}: '{name}' names {path}, which is not there; check file_name")
    return Source(name, path, info)


def check_entry(info: Any, what: str) -> None:
    """An entry of dataset_info.json has the shape that the readers count on."""
    if not isinstance(info, dict):
        raise UserError(f"{what} is a {type(info).__name__}, not an object; mend it")
    for key in ("file_name", "hf_hub_url", "split"):
        if not isinstance(info.get(key, ""), str):
            raise UserError(f"{what}: {key} is not text; mend it")
    for key in ("columns", "tags"):
        names = info.get(key) or {}
        if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
            raise UserError(f"{what}: {key} is not an object of names; mend it")
    if info.get("formatting", "alpaca") not in ("alpaca", "sharegpt"):
        raise UserError(
            f"{what}: formatting '{info['formatting']}' is not supported; use alpaca or sharegpt"
        )


def read_rows(source: Source, config: Config) -> list[dict[str, Any]]:
    """Raw rows. JSON by its own parser, for line numbers; the rest through `datasets`."""
    path = source.path
    if path is not None and path.is_file() and path.suffix in (".json", ".jsonl"):
        return read_json(path)
    kind, files = str(source.info.get("hf_hub_url")), None
    if path is not None:
        files = sorted(map(str, path.iterdir())) if path.is_dir() else [str(path)]
        kind = Path(files[0]).suffix.removeprefix(".").replace("jsonl", "json") if files else ""
        if kind not in ("json", "csv", "parquet"):
            raise UserError(f"{path}: holds no json, jsonl, csv or parquet file; check file_name")
    import datasets

    # Errors are raised and said in one line here; its own log would say them a second time.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)

    split = source.info.get("split", "train") if path is None else "train"
    try:
        loaded = datasets.load_dataset(
            kind, data_files=files, split=split, cache_dir=config.cache_dir
        )
        return [dict(row) for row in loaded]
    except Exception as error:  # whatever `datasets` raises, the user can mend the file or the name
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path or kind}: cannot be read ({why}); mend or replace it") from None


def read_json(path: Path) -> list[dict[str, Any]]:
    """A list of objects, or an object a line; UTF-8 with or without a byte order mark."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    try:
        number = 0  # of the line, where each line is an object of its own
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = []
            for line in text.split("\n"):
                number += 1
                if line.strip():
                    rows.append(json.loads(line))
    except json.JSONDecodeError as error:
        number = number or error.lineno
        raise UserError(f"{path}: not JSON, line {number}: {error.msg}; mend the line") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); mend it") from None
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{path} row {i}: is a {type(row).__name__}, not an object; mend the row"
            )
    return rows


def text_of(
    row: dict[str, Any], column: str | None, where: str, *, needed: bool = False
) -> str | None:
    """The text in a column; None where it is absent or empty."""
    value = row.get(column) if column else None
    if value is None or value == "":
        if needed:
            raise UserError(f"{where}: has no '{column}'; add it, or drop the row")
        return None
    if isinstance(value, str) and value.encode("utf-8", "ignore").decode() != value:
        raise UserError(f"{where}: '{column}' holds half a character; mend the row")
    if isinstance(value, str) and needed and not value.strip():
        raise UserError(f"{where}: '{column}' is blank; fill it in, or drop the row")
    if not isinstance(value, str):
        raise UserError(f"{where}: '{column}' is a {type(value).__name__}, not text; mend the row")
    return value


def read_alpaca(row: dict[str, Any], where: str, source: Source) -> Record:
    """instruction and input, joined by a line break; output, or chosen and rejected."""
    columns = source.info.get("columns") or ALPACA_COLUMNS
    question = text_of(row, columns.get("prompt", "instruction"), where, needed=True)
    query = text_of(row, columns.get("query"), where)
    messages = []
    history = row.get(columns.get("history", "")) or []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or [type(part) for part in turn] != [str, str]:
            raise UserError(f"{where}: history is not a list of [question, answer]; mend the row")
        messages += [
            {"role": "user", "content": turn[0]},
            {"role": "assistant", "content": turn[1]},
        ]
    messages.append({"role": "user", "content": f"{question}\n{query}" if query else str(question)})
    answers: dict[str, str | None] = {}
    if source.ranking:
        for name in ("chosen", "rejected"):
            answers[name] = text_of(row, columns.get(name, name), where, needed=True)
    else:
        answers["response"] = text_of(row, columns.get("response"), where)
    system = text_of(row, columns.get("system"), where)
    return Record(messages, where, system=system, columns=row, **answers)


def read_sharegpt(row: dict[str, Any], where: str, source: Source) -> Record:
    """A list of turns, user and assistant by turns; pairs end with a user's."""
    columns = source.info.get("columns") or {"messages": "conversations"}
    tags = SHAREGPT_TAGS | (source.info.get("tags") or {})
    roles = {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["system_tag"]: "system",
    }
    turns = row.get(columns.get("messages", "conversations"))
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: has no '{columns.get('messages', 'conversations')}'; add it")
    messages: list[Message] = []
    for turn in turns:
        role = roles.get(str(turn.get(tags["role_tag"]))) if isinstance(turn, dict) else None
        if role is None:
            raise UserError(
                f"{where}: a turn by nobody known ({turn!r:.60}); it needs {list(roles)}"
            )
        messages.append(
            {"role": role, "content": str(text_of(turn, tags["content_tag"], where, needed=True))}
        )
    system = text_of(row, columns.get("system"), where)
    if messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    response = None
    if messages and messages[-1]["role"] == "assistant" and not source.ranking:
        response = messages.pop()["content"]
    order = [message["role"] for message in messages]
    if order != ["user", "assistant"] * (len(order) // 2) + ["user"]:
        raise UserError(
            f"{where}: turns are {', '.join(order)}; user and assistant must alternate, and "
            "the last question must be the user's"
        )
    answers: dict[str, str | None] = {}
    if source.ranking:
        for name in ("chosen", "rejected"):
            turn = row.get(columns.get(name, name))
            if not isinstance(turn, dict):
                raise UserError(f"{where}: has no '{name}'; add it, or drop the row")
            answers[name] = text_of(turn, tags["content_tag"], where, needed=True)
    return Record(messages, where, system=system, response=response, columns=row, **answers)


def fit(record: Record, template: Template, limit: int, default_system: str | None) -> list[int]:
    """The record's prompt in at most `limit` tokens."""
    system = record.system if record.system is not None else default_system
    ids = template.fit_prompt(record.messages, system, limit)
    if ids is None:
        raise UserError(
            f"{record.where}: its prompt does not fit in cutoff_len even without its question; "
            f"raise "
            "cutoff_len"
        )
    return ids


def encode_prompts(
    records: list[Record], template: Template, cutoff_len: int, default_system: str | None = None
) -> list[Prompt]:
    """Prompts with the generation header at their end, at most `cutoff_len` tokens each."""
    prompts = []
    for record in records:
        system = record.system if record.system is not None else default_system
        prompts.append(
            Prompt(
                ids=fit(record, template, cutoff_len, default_system),
                text=record.messages[-1]["content"],
                reference=record.response,
                columns=record.columns,
                messages=[
                    *([{"role": "system", "content": system}] if system else []),
                    *record.messages,
                ],
            )
        )
    return prompts


def encode_pairs(
    records: list[Record], template: Template, cutoff_len: int, default_system: str | None = None
) -> list[Pair]:
    """Pairs in at most `cutoff_len` tokens, prompt and answer; answers lose their ends first.

    An answer keeps its EOS, where its score is read.
    """
    pairs = []
    for record in records:
        prompt = fit(record, template, max(cutoff_len // 2, 1), default_system)
        room = cutoff_len - len(prompt) - 1
        chosen, rejected = (
            template.encode_response(text or "") for text in (record.chosen, record.rejected)
        )
        chosen, rejected = (ids[:-1][:room] + ids[-1:] for ids in (chosen, rejected))
        pairs.append(Pair(prompt, chosen, rejected))
    return pairs
