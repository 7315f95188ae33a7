"""What a name in `dataset` means: an entry of dataset_info.json, a path, or a name on the hub."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.config.schema import extra_allowed
from fastppo.errors import UserError

if TYPE_CHECKING:
    from fastppo.config import Config

# Extension -> the builder of `datasets` that reads it.
READERS = {
    "json": "json",
    "jsonl": "json",
    "csv": "csv",
    "parquet": "parquet",
    "arrow": "arrow",
    "txt": "text",
}
FORMATS = ("alpaca", "sharegpt", "openai")
ELSEWHERE = {
    "ms_hub_url": "on ModelScope",
    "om_hub_url": "on openMind",
    "script_url": "a script to run",
    "cloud_file_name": "in a cloud's storage",
}
PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".tar", ".tgz", ".7z")
# LLaMA-Factory's keys of an entry, of its columns and of its tags.
ENTRY_KEYS = (
    "file_name",
    "formatting",
    "ranking",
    "columns",
    "tags",
    "num_samples",
    "hf_hub_url",
    "subset",
    "split",
    "folder",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "cloud_file_name",
    "file_sha1",  # which LLaMA-Factory has ceased to look at, too
)
COLUMNS = (
    "prompt",
    "query",
    "response",
    "history",
    "messages",
    "system",
    "tools",
    "images",
    "videos",
    "audios",
    "chosen",
    "rejected",
    "kto_tag",
)
TAG_KEYS = (
    "role_tag",
    "content_tag",
    "user_tag",
    "assistant_tag",
    "observation_tag",
    "function_tag",
    "system_tag",
)
# What LLaMA-Factory had in 2023, and what other words are used for.
MISPLACED = {
    "stage": '"ranking": true marks pairs, for stage rm; take it out',
    "columns: role": "today that is role_tag in tags",
    "columns: content": "today that is content_tag in tags",
    "load_from": "hf_hub_url, file_name or another key says it; take it out",
    "dataset_name": "name the set by this entry's own name, and its file by file_name",
    "dataset_sha1": "today that is file_sha1, at which nobody looks; take it out",
    "max_samples": "here that is num_samples, or max_samples in the run's file",
}
NOT_TEXT = {
    "images": "pictures",
    "videos": "videos",
    "audios": "sound",
    "kto_tag": "single answers marked good or bad (KTO)",
}


@dataclass(frozen=True)
class Source:
    """A data set: its description from dataset_info.json, and where its rows are."""

    name: str
    info: dict[str, Any]  # the entry of dataset_info.json
    path: Path | None = None  # a file, or a folder of files of one type
    hub: str | None = None  # its name on the Hugging Face hub, if it has no path
    plain: bool = False  # whether it is named by its path or hub name, not by an entry

    @property
    def ranking(self) -> bool:
        """Whether its rows are preference pairs instead of prompts."""
        return bool(self.info.get("ranking", False))

    @property
    def split(self) -> str:
        """The split to read, as `datasets` names it."""
        return str(self.info.get("split") or "train")


def check_ranking(config: Config, source: Source) -> None:
    """Raise UserError for prompts in stage rm, which needs pairs, and for pairs in stage ppo."""
    if config.stage == "rm" and not source.ranking:
        raise UserError(
            f"{config.source}: dataset: stage rm learns from pairs, and '{source.name}' is not "
            'marked "ranking": true in dataset_info.json; name a set of pairs (chosen, rejected)'
        )
    if config.stage == "ppo" and source.ranking:
        raise UserError(
            f"{config.source}: dataset: stage ppo learns from prompts, and '{source.name}' is a "
            'set of pairs ("ranking": true); name a set of prompts, or use stage: rm'
        )


def find_source(config: Config, name: str, key: str) -> Source:
    """The data set `name`: a path with a known extension, else an entry of dataset_info.json.

    With `dataset_dir: ONLINE` it is a name on the hub. `key` is the setting that names the set.
    """
    if not name:
        raise UserError(f"{config.source}: {key}: names nothing between two commas; take one out")
    direct = Path(name)
    if direct.suffix.removeprefix(".").lower() in READERS:
        if not direct.is_file():
            raise UserError(f"{config.source}: {key}: no file {name}; check the path")
        return Source(name, {"ranking": config.stage == "rm"}, direct, plain=True)
    if config.dataset_dir == "ONLINE":
        return Source(name, {"ranking": config.stage == "rm"}, hub=name, plain=True)
    if config.dataset_dir.startswith("REMOTE:"):
        raise UserError(
            f"{config.source}: dataset_dir: REMOTE: is not supported; download "
            "dataset_info.json and name its folder"
        )
    infos, path = read_info(config)
    if name not in infos:
        if direct.is_file():
            raise UserError(f"{config.source}: {key}: {name} {unread(direct)}")
        near = difflib.get_close_matches(name, infos, n=1, cutoff=0.5)
        cure = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(list(infos)[:8])}"
        raise UserError(f"{config.source}: {key}: {path} names no '{name}'; {cure}")
    what = f"{path}: '{name}'"
    check_keys(infos[name], what)
    check_entry(infos[name], what)
    return locate(name, infos[name], path.parent, what)


def read_info(config: Config) -> tuple[dict[str, Any], Path]:
    """The contents and the path of dataset_info.json."""
    path = Path(config.dataset_dir) / "dataset_info.json"
    if not path.is_file():
        raise UserError(
            f"{config.source}: dataset_dir: no {path}; set dataset_dir to the folder that has it, "
            "or name the data's own files in dataset"
        )
    try:
        infos = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); mend it") from None
    if not isinstance(infos, dict):
        raise UserError(f"{path}: is not an object of data sets by name; mend it")
    return infos, path


def locate(name: str, info: dict[str, Any], folder: Path, what: str) -> Source:
    """The source with its path or hub name; as in LLaMA-Factory, hf_hub_url is preferred."""
    if info.get("hf_hub_url"):
        check_hub_name(info, what)
        return Source(name, info, hub=info["hf_hub_url"])
    for key, where in ELSEWHERE.items():
        if info.get(key):
            raise UserError(
                f"{what} is {where} ({key}), which is not read; download it and give a file_name"
            )
    if not info.get("file_name"):
        raise UserError(f"{what} has no file_name; add one")
    path = folder / info["file_name"]
    # Data may come from anywhere, and must not name files outside its own folder.
    for file in (path, *(path.iterdir() if path.is_dir() else ())):
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{what}: file_name {info['file_name']} leads out of {folder}; move the file in, "
                "or name its path in dataset"
            )
    if not path.exists():
        raise UserError(f"{what} names {path}, which is not there; check file_name")
    return Source(name, info, path)


def check_hub_name(info: dict[str, Any], what: str) -> None:
    """Raise UserError if hf_hub_url is no name on the hub, or could be read as a local folder."""
    name = info["hf_hub_url"]
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or Path(name).exists():
        raise UserError(
            f"{what}: hf_hub_url {name!r} is no owner/name on the hub; mend it, or give a file_name"
        )
    inner = info.get("folder") or ""
    if Path(inner).is_absolute() or ".." in Path(inner).parts:
        raise UserError(f"{what}: folder {inner!r} leads out of the data set; mend it")


def unread(path: Path) -> str:
    """Why a file of a type that is not read is refused, and the cure; after the file's name."""
    if path.suffix.lower() in PACKED:
        return "is packed; unpack it, and name the file that was in it"
    return (
        f"is a file of type {path.suffix or 'none'}; a data set is json, jsonl, csv, parquet, "
        "arrow or txt: save it as one of them"
    )


def check_keys(info: Any, what: str) -> None:
    """Refuse a key that LLaMA-Factory does not know either: it would be read by nobody.

    What begins with an underscore is a comment, and ALLOW_EXTRA_ARGS=1 lets everything pass.
    """
    if not isinstance(info, dict) or extra_allowed():
        return
    for known, found, where in (
        (ENTRY_KEYS, info, ""),
        (COLUMNS, info.get("columns"), "columns: "),
        (TAG_KEYS, info.get("tags"), "tags: "),
    ):
        for name in found if isinstance(found, dict) else ():
            if name in known or name.startswith("_"):
                continue
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            if cure := MISPLACED.get(f"{where}{name}"):
                pass
            elif name in COLUMNS and not where:
                cure = "it belongs into columns"
            elif name in TAG_KEYS and where != "tags: ":
                cure = "it belongs into tags"
            elif near:
                cure = f"did you mean '{near[0]}'?"
            else:
                cure = f"the keys are {', '.join(known)}; take it out"
            raise UserError(f"{what}: {where}unknown key '{name}'; {cure}")


def check_entry(info: Any, what: str) -> None:
    """Raise UserError for an entry of dataset_info.json with values that are not supported."""
    if not isinstance(info, dict):
        raise UserError(f"{what} is a {type(info).__name__}, not an object; mend it")
    for key in ("file_name", "hf_hub_url", "split", "subset", "folder"):
        if not isinstance(info.get(key) or "", str) or "\0" in (info.get(key) or ""):
            raise UserError(f"{what}: {key} is not text; mend it")
    if not isinstance(info.get("ranking", False), bool):
        raise UserError(f"{what}: ranking is {info['ranking']!r}; it should be true or false")
    count = info.get("num_samples")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise UserError(f"{what}: num_samples is {count!r}; it should be a count of rows")
    for key in ("columns", "tags"):
        names = info.get(key) or {}
        if not isinstance(names, dict):
            raise UserError(f"{what}: {key} is not an object of names; mend it")
        for inner, value in names.items():
            if not isinstance(value, str) and (value is not None or key == "tags"):
                raise UserError(
                    f"{what}: {key}: {inner} is {json.dumps(value)}, not a name; mend it"
                )
    if info.get("formatting", "alpaca") not in FORMATS:
        raise UserError(
            f"{what}: formatting {info['formatting']!r} is not supported; "
            f"use {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        )
    columns = info.get("columns") or {}
    asked = ("prompt", "query") if info.get("formatting", "alpaca") == "alpaca" else ("messages",)
    if columns and not any(columns.get(name) for name in asked):
        raise UserError(
            f"{what}: columns names no {asked[0]}, and where there are columns none has a default; "
            "add it"
        )
    for column, words in NOT_TEXT.items():
        if columns.get(column):
            raise UserError(
                f"{what} has {words} (columns: {column}); fastppo learns from text: prompts, or "
                "pairs of answers"
            )
