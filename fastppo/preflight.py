"""Everything that can be refused before torch is imported; nothing is written."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.data import Records, read_records
from fastppo.errors import UserError
from fastppo.templates import check_name

if TYPE_CHECKING:
    from fastppo.config import Config


def check(config: Config) -> Records:
    """Refuse what cannot run; give back the records that were read on the way."""
    try:
        check_name(config.template)
    except UserError as error:
        raise UserError(f"{config.source}: {error}") from None
    check_packages(config)
    check_model(config)
    if config.stage == "ppo" and config.reward_model_type == "lora":
        check_reward_model(config)
    check_output_dir(config)
    return read_records(config)


def check_packages(config: Config) -> None:
    """Optional packages that the file asks for are there."""
    for key, asked, package, extra in (
        ("report_to", config.report_to, config.report_to, "tracking"),
        (
            "flash_attn",
            config.flash_attn if config.flash_attn == "fa2" else "none",
            "flash_attn",
            "flash-attn",
        ),
    ):
        if asked != "none" and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{config.source}: {key}: {asked} needs a package that is not installed; "
                f"pip install 'fastppo[{extra}]', or leave {key} out"
            )


def looks_local(name: str) -> bool:
    """A path, and not the name of a repository on the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def read_json_file(path: Path, what: str) -> dict[str, Any]:
    """A small JSON file of a model folder."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {path} cannot be read ({error}); mend or replace it") from None
    if not isinstance(data, dict):
        raise UserError(f"{what}: {path} is not a JSON object; replace it")
    return data


def check_model(config: Config) -> None:
    """A local model folder has to be one."""
    name = config.model_name_or_path
    folder = Path(name)
    if not looks_local(name):
        return
    if not folder.is_dir():
        raise UserError(
            f"{config.source}: model_name_or_path: no folder {name}; check the path, or name a "
            f"model on "
            "the hub as owner/name"
        )
    if not (folder / "config.json").is_file() and not config.model_gguf_file:
        raise UserError(
            f"{config.source}: model_name_or_path: {name} has no config.json; name a folder that "
            "save_pretrained wrote"
        )


def check_reward_model(config: Config) -> None:
    """An adapter, a head, and a head of the base's hidden size."""
    assert config.reward_model is not None
    folder = Path(config.reward_model)
    cure = "train one with stage: rm and name its output_dir"
    if not folder.is_dir():
        raise UserError(f"{config.source}: reward_model: no folder {folder}; {cure}")
    for name, what in (
        ("adapter_config.json", "adapter"),
        ("adapter_model.safetensors", "adapter"),
        ("value_head.safetensors", "value head"),
    ):
        if not (folder / name).is_file():
            raise UserError(
                f"{config.source}: reward_model: {folder} has no {what} ({name}); {cure}"
            )
    head = head_size(folder / "value_head.safetensors", config.source)
    base = hidden_size(config)
    if base is not None and head != base:
        raise UserError(
            f"{config.source}: reward_model: the head in {folder} is for hidden size {head}, and "
            f"{config.model_name_or_path} has {base}; train the reward model on the same base"
        )


def head_size(path: Path, source: str) -> int:
    """Hidden size that a value head was made for, from the safetensors header alone."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < 1 << 20 else {}
        return int(header["v_head.summary.weight"]["shape"][-1])
    except (OSError, ValueError, KeyError, IndexError, TypeError, struct.error):
        raise UserError(
            f"{source}: reward_model: {path} has no v_head.summary.weight; train one with stage: rm"
        ) from None


def hidden_size(config: Config) -> int | None:
    """The base's hidden size where its config.json is at hand."""
    path = Path(config.model_name_or_path) / "config.json"
    if not path.is_file():
        return None
    data = read_json_file(path, f"{config.source}: model_name_or_path")
    size = data.get("hidden_size", (data.get("text_config") or {}).get("hidden_size"))
    return int(size) if size is not None else None


def check_output_dir(config: Config) -> None:
    """An earlier run's folder is not written into unless the file says so."""
    folder = Path(config.output_dir)
    if folder.is_file():
        raise UserError(f"{config.source}: output_dir: {folder} is a file; name a folder")
    allowed = config.overwrite_output_dir or config.resume_from_checkpoint
    if not allowed and folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{config.source}: output_dir: {folder} is not empty; name another, or set "
            "overwrite_output_dir: true"
        )
