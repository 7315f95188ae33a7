"""The configuration of an export: LLaMA-Factory's export keys, or two folders. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fastppo.config import Config, downloads
from fastppo.config.below import ADAPTER, adapters_below, base_of, check_below, is_same
from fastppo.config.elsewhere import IGNORED
from fastppo.config.file import override, read_file, read_json
from fastppo.config.key import HF, LF, Positive, key
from fastppo.config.old_names import GONE, meant, with_todays_names
from fastppo.config.rewards import split
from fastppo.config.schema import explain_in, suggest, unwritable
from fastppo.errors import UserError
from fastppo.run.durable import checkpoints


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
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # of an adapter
PARTIAL = ".export.partial"  # in export_dir, until the export is complete
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
    settings = [text for text in arguments if "=" in text]
    try:
        data, source = read_names(names, settings)
        for text in settings:
            override(data, text)
        return parse_export(data, source)
    except OSError as error:
        where = str(error.filename)[:200]
        raise UserError(f"{where}: {error.strerror}; check the path and its permissions") from None


def read_names(names: Sequence[str], settings: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The keys that `names` give, which are CONFIG or FOLDER and EXPORT_DIR; and their source."""
    if not names:
        raise UserError(
            "no FOLDER and no CONFIG; name a run's output_dir and the folder to write, for "
            "example saves/ppo merged"
        )
    if len(names) > 2:
        raise UserError(
            f"{len(names)} names, and {names[2]!r} is one too many; name a run's output_dir and "
            "the folder to write, and settings as key=value"
        )
    first = Path(names[0])
    if len(names) == 1 and not first.is_dir():
        if not first.exists():
            raise UserError(
                f"no file or folder {first}; name a CONFIG, or a run's output_dir and the folder "
                "to write"
            )
        needed = "model_name_or_path or adapter_name_or_path, export_dir"
        return read_file(first, needed), names[0]
    data = from_folder(first)
    if len(names) == 2:
        data["export_dir"] = names[1]
    elif not any(text.startswith("export_dir=") for text in settings):
        raise UserError(f"no EXPORT_DIR; name the folder to write after {first}, as {first} merged")
    return data, "fastppo-export"


def parse_export(data: Mapping[str, Any], source: str) -> tuple[ExportConfig, list[str]]:
    """Make a configuration from the keys in `data`; also returns notes on ignored keys.

    The base is filled in if no key names it. `source` is the file's name, for errors.
    """
    given, notes = with_todays_names(dict(data), source)
    if "output_dir" in given:
        raise UserError(
            f"{source}: output_dir: is a training's, and an export would leave out what was "
            f"trained; run: fastppo-export {given['output_dir']} EXPORT_DIR"
        )
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
    if folder.is_file():
        raise UserError(
            f"{folder} is a file; name a run's output_dir before EXPORT_DIR, or a CONFIG alone, "
            "with export_dir among its keys"
        )
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; name one that a run or PEFT wrote")
    if (folder / ADAPTER).is_file():
        return {"adapter_name_or_path": str(folder)}
    if (folder / "config.json").is_file():
        return {"model_name_or_path": str(folder)}
    if saved := checkpoints(folder):
        raise UserError(
            f"{folder} has no model, since its run did not end; name a checkpoint of it, for "
            f"example {saved[-1]}"
        )
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
    for name in config.adapters:
        own = base_of(Path(name))
        if own is not None and not is_same(own, base):
            notes.append(f"{name} was trained on {own}, and is merged into {base}")
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
        if folder.is_dir() and not any((folder / weights).is_file() for weights in WEIGHTS):
            raise UserError(  # PEFT would ask the hub for them
                f"{source}: adapter_name_or_path: {name} has no {WEIGHTS[0]}, and is not whole: "
                "fetch or save it again"
            )
    base, where = config.model_name_or_path, None
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
        if where is not None:
            raise UserError(
                f"{source}: model_name_or_path: {where} names the base {base}, and there is no "
                "such folder here; write where it lies, as model_name_or_path=FOLDER"
            )
        raise UserError(f"{source}: model_name_or_path: no folder {base}; check the path")
    check_target(Path(config.export_dir), source)
    return config.model_copy(update={"model_name_or_path": base})


def check_downloads(config: ExportConfig) -> None:
    """Ask the hub once for base and adapters that are no folders, before torch is imported.

    Raises:
        UserError: the hub does not answer, or has nothing of this name for this user.
    """
    named = [("model_name_or_path", str(config.model_name_or_path), "config.json")]
    named += [("adapter_name_or_path", name, ADAPTER) for name in config.adapters]
    for where, name, file in named:
        if not Path(name).is_dir():
            downloads.check_download(
                f"{where}:",
                name,
                file,
                revision=config.model_revision if where == "model_name_or_path" else "main",
                cache_dir=config.cache_dir,
                token=config.hf_hub_token,
            )


def check_target(target: Path, source: str) -> None:
    """Check that the export overwrites nothing."""
    if unwritable(str(target)):
        raise UserError(
            f"{source}: export_dir: {str(target)!r} holds a null or half a character; name another"
        )
    for above in (target, *target.parents):
        if above.exists() and not above.is_dir():
            raise UserError(f"{source}: export_dir: {above} is a file; name a folder")
    # What an export that was killed has left is deleted by the next one.
    if target.is_dir() and any(path.name != PARTIAL for path in target.iterdir()):
        raise UserError(f"{source}: export_dir: {target} is not empty; name another")
