"""The configuration of an export: LLaMA-Factory's export keys, or two folders. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fastppo.config import Config
from fastppo.config.below import ADAPTER, adapters_below, base_of, check_below, is_same
from fastppo.config.elsewhere import IGNORED
from fastppo.config.file import override, read_file, read_json
from fastppo.config.key import HF, LF, Positive, key
from fastppo.config.old_names import GONE, meant, with_todays_names
from fastppo.config.rewards import split
from fastppo.config.schema import explain_in, suggest
from fastppo.errors import UserError


class ExportConfig(BaseModel):
    """The keys of one export, each with a description; frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_name_or_path: str | None = key(
        None, LF, "The base, or a whole model; null is the base that the adapter names."
    )
    adapter_name_or_path: str | None = key(
        None, LF, "Adapters to merge into it, comma separated, in their order."
    )
    template: str | None = key(
        None, LF, "Chat template by name; null is the one that the training recorded."
    )
    default_system: str | None = key(
        None, LF, "Default system prompt of the training; null is the one that it recorded."
    )
    enable_thinking: bool | None = key(
        None, LF, "Whether the policy was trained to think; null is what the training recorded."
    )
    preserve_thinking: bool | None = key(
        None, LF, "Whether earlier answers kept their thoughts; null is what was recorded."
    )
    export_dir: str = key(..., LF, "Where the model goes; empty, or not there yet.")
    export_size: Positive = key(5, LF, "Most gigabytes in a file of weights.")
    export_device: Literal["cpu", "auto"] = key(
        "cpu", LF, "Where adapters are merged; auto is the GPU where there is one."
    )
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = key(
        "auto", LF, "Number format of the export; auto is the base's."
    )
    stage: Literal["pt", "sft", "rm", "ppo", "dpo", "kto"] | None = key(
        None,
        LF,
        "rm exports a sequence classifier, others a language model; null is rm for what "
        "fastppo's stage rm wrote.",
    )
    trust_remote_code: bool = key(
        False, LF, "Run code that comes with the model; off unless asked."
    )
    cache_dir: str | None = key(None, LF, "Where the hub's files are kept.")
    model_revision: str = key("main", LF, "Branch, tag or commit on the hub.")
    hf_hub_token: str | None = key(None, HF, "Token for the hub; null is that of the environment.")

    @property
    def adapters(self) -> list[str]:
        """The adapters in `adapter_name_or_path`, as a list."""
        return split(self.adapter_name_or_path) if self.adapter_name_or_path else []

    @property
    def trained_folder(self) -> Path:
        """The folder with value head, tokenizer and records: the last adapter's, or the model's."""
        return Path(self.adapters[-1] if self.adapters else self.model_name_or_path or "")


# Keys for other kinds of export, which is not done here: key -> (accepted values, cure).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "export_legacy_format": ((False, None), "transformers writes safetensors only; leave it out"),
    "export_hub_model_id": ((None,), "upload export_dir with the hub's own command: hf upload"),
    "export_quantization_bit": ((None,), "quantise what was exported with the quantiser's tool"),
    "quantization_bit": ((None,), "adapters merge into whole weights only; leave it out"),
}
# What LLaMA-Factory's export called its keys until 2023.
EXPORT_NAMES = {"max_shard_size": "here that is export_size, a number of gigabytes"}
MEANINGLESS = {
    "do_train",
    "export_quantization_dataset",
    "export_quantization_maxlen",
    "export_quantization_nsamples",
    "infer_backend",
    "offload_folder",
}


def read_export(arguments: Sequence[str]) -> tuple[ExportConfig, list[str]]:
    """Read the command line; returns the configuration, and a note for each key that is ignored.

    `arguments` are CONFIG, or FOLDER and EXPORT_DIR; overrides `key=value` may be among them.
    """
    names = [text for text in arguments if "=" not in text]
    if len(names) == 2:
        data, source = from_folder(Path(names[0])), "fastppo-export"
        data["export_dir"] = names[1]
    elif len(names) == 1 and not Path(names[0]).is_dir():
        data, source = read_file(Path(names[0])), names[0]
    else:
        raise UserError(
            "wants CONFIG, or a FOLDER of a run and the EXPORT_DIR to write; see --help"
        )
    for text in arguments:
        if "=" in text:
            override(data, text)
    return parse_export(data, source)


def parse_export(data: Mapping[str, Any], source: str) -> tuple[ExportConfig, list[str]]:
    """Make a configuration from the keys in `data`; also returns notes on ignored keys.

    The base is filled in if no key names it. `source` is the file's name, for errors.
    """
    given, notes = with_todays_names(dict(data), source)
    for name in list(given):
        if name in REFUSED:
            accepted, cure = REFUSED[name]
            if meant(given.pop(name)) not in accepted:
                raise UserError(f"{source}: {name}: not supported; {cure}")
        elif name in ExportConfig.model_fields:
            if given[name] is None and not ExportConfig.model_fields[name].is_required():
                del given[name]
        elif name in {*Config.model_fields, *IGNORED, *GONE, *MEANINGLESS}:
            notes.append(f"'{name}' means nothing to an export and is ignored")
            del given[name]
        else:
            listed = "docs/export.md lists the keys; take it out"
            known = list(ExportConfig.model_fields)
            cure = EXPORT_NAMES.get(name) or suggest(name, known, listed)
            raise UserError(f"{source}: unknown key '{name}'; {cure}")
    if isinstance(given.get("adapter_name_or_path"), list):
        given["adapter_name_or_path"] = ",".join(map(str, given["adapter_name_or_path"]))
    try:
        config = ExportConfig(**given)
    except ValidationError as error:
        raise UserError(f"{source}: {explain_in(ExportConfig, error)}") from None
    config = check_folders(config, source)
    return add_adapters_below(config, source, notes), notes


def from_folder(folder: Path) -> dict[str, Any]:
    """The keys that export `folder`: an adapter or a whole model."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; name one that a run or PEFT wrote")
    if (folder / ADAPTER).is_file():
        return {"adapter_name_or_path": str(folder)}
    if (folder / "config.json").is_file():
        return {"model_name_or_path": str(folder)}
    raise UserError(f"{folder} has neither {ADAPTER} nor config.json; name a run's output_dir")


def add_adapters_below(config: ExportConfig, source: str, notes: list[str]) -> ExportConfig:
    """`config` with the adapters that its first one was trained on top of, which a file may omit.

    They are merged too where the base is the one that the adapter names; on another model nobody
    knows whether it has them already, and that is refused.
    """
    names, base = config.adapters, str(config.model_name_or_path)
    below = adapters_below(Path(names[0])) if names else []
    if below and is_same(base_of(Path(names[0])) or "", base):
        missing = [name for name in below if is_absent(name)]
        if missing:
            raise UserError(
                f"{source}: adapter_name_or_path: {names[0]} was trained on {base} with "
                f"{missing[0]} merged into it, and there is no folder {missing[0]} here; write "
                f"where it lies, as adapter_name_or_path: SFT_FOLDER,{names[0]}"
            )
        notes.append(
            f"{names[0]} was trained on {base} with {', '.join(below)} merged into it, so that "
            "is merged first"
        )
        joined = ",".join([*below, *names])
        config = config.model_copy(update={"adapter_name_or_path": joined})
    check_below(source, "adapter_name_or_path", base, config.adapters)
    return config


def is_absent(name: str) -> bool:
    """Whether an adapter's name is that of a folder, and there is none; else it may be a hub's."""
    folder = Path(name)
    return not folder.is_dir() and (name.count("/") != 1 or folder.parent.is_dir())


def check_folders(config: ExportConfig, source: str) -> ExportConfig:
    """Check that folders can be read and none is overwritten; returns `config` with its base."""
    for name in config.adapters:
        folder = Path(name)
        if folder.is_dir() and not (folder / ADAPTER).is_file():
            whole = (folder / "config.json").is_file()
            cure = (
                "it is a whole model: name it in model_name_or_path"
                if whole
                else ("name a folder that PEFT wrote")
            )
            raise UserError(f"{source}: adapter_name_or_path: {name} has no {ADAPTER}; {cure}")
        if is_absent(name):
            raise UserError(f"{source}: adapter_name_or_path: no folder {name}; check the path")
    base = config.model_name_or_path
    if base is None:
        where = Path(config.adapters[0]) / ADAPTER if config.adapters else Path(ADAPTER)
        base = read_json(where).get("base_model_name_or_path") if where.is_file() else None
        if not base:
            raise UserError(
                f"{source}: model_name_or_path: missing, and no adapter's {ADAPTER} names a base; "
                "name the base or a whole model"
            )
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        cure = "check the path"
        if (Path(base) / ADAPTER).is_file():
            cure = "it is an adapter: name it in adapter_name_or_path, and its base here"
        raise UserError(f"{source}: model_name_or_path: {base} has no config.json; {cure}")
    if not Path(base).is_dir() and (base.startswith(("/", ".")) or base.count("/") > 1):
        raise UserError(f"{source}: model_name_or_path: no folder {base}; check the path")
    target = Path(config.export_dir)
    for above in (target, *target.parents):
        if above.exists() and not above.is_dir():
            raise UserError(f"{source}: export_dir: {above} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{source}: export_dir: {target} is not empty; name another")
    return config.model_copy(update={"model_name_or_path": base})
