"""Everything that can be refused before torch is imported; nothing is written."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastppo import packages
from fastppo.config import downloads
from fastppo.config.below import ADAPTER, check_below
from fastppo.config.file import read_json
from fastppo.config.published import hidden_width
from fastppo.config.rewards import HEAD_FILES, split
from fastppo.config.training import BITSANDBYTES
from fastppo.config.weights import BIN, SAFETENSORS, find_head, folder_shapes, weight_files
from fastppo.data import Records, read_records
from fastppo.errors import UserError
from fastppo.run import durable, hub
from fastppo.run.launch import check_launcher, check_one_process
from fastppo.run.sizes import check_sizes, read_header
from fastppo.templates import check_name

if TYPE_CHECKING:
    from fastppo.config import Config


def check(config: Config, records: Records | None = None, *, shared: bool = False) -> Records:
    """Raise UserError for a run that cannot work; return the records that were read on the way.

    Args:
        config: the run's.
        records: are not read if a program gives them.
        shared: whether the run may be shared by several processes, as that of a command may.
    """
    if shared:
        check_launcher(config)
    else:
        check_one_process("init_state" if records is None else config.source, "output_dir")
    if config.hf_hub_token:
        os.environ["HF_TOKEN"] = config.hf_hub_token  # where all of the hub's clients look
    if config.swanlab_api_key and "swanlab" in config.trackers:
        os.environ["SWANLAB_API_KEY"] = config.swanlab_api_key
    try:
        check_name(config.template)
    except UserError as error:
        raise UserError(f"{config.source}: {error}") from None
    try:
        check_files(config)
        found = read_records(config) if records is None else records
        hub.check(config)
        return found
    except OSError as error:
        raise UserError(
            f"{config.source}: {str(error.filename)[:200]}: {error.strerror}; check the path"
        ) from None


def check_files(config: Config) -> None:
    """Check the folders and files that the configuration names."""
    check_packages(config)
    for key in ("model_name_or_path", "ref_model", "critic_model"):
        if key not in config.objects.names():
            check_model(config, key)
    for key in ("adapter_name_or_path", "ref_model_adapters"):
        check_adapters(config, key)
    check_rewards(config)
    check_sizes(config)
    check_output_dir(config)


def check_packages(config: Config) -> None:
    """Check that the optional packages that the configuration needs are installed."""
    quantised = [
        (key, str(bits), "bitsandbytes", "quantization")
        for key in (
            "quantization_bit",
            "ref_model_quantization_bit",
            "reward_model_quantization_bit",
        )
        if (bits := getattr(config, key)) is not None
    ]
    local = "swanlab" in config.trackers and config.swanlab_mode == "local"
    if local and importlib.util.find_spec("swanlab") and not importlib.util.find_spec("swanboard"):
        raise UserError(  # SwanLab prints a traceback, goes on, and shows no run
            f"{config.source}: swanlab_mode: local needs swanboard, which is not installed; run: "
            "pip install 'swanlab[dashboard]', or leave swanlab_mode out"
        )
    attention = [("flash_attn", "fa2", "flash_attn", "flash-attn")]
    optimisers = [("optim", config.optim, "bitsandbytes", "quantization")]
    for key, asked, package, extra in (
        *(("report_to", name, name, "tracking") for name in config.trackers),
        *(attention if config.flash_attn == "fa2" else []),
        *(optimisers if config.optim in BITSANDBYTES else []),
        *quantised,
    ):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{config.source}: {key}: {asked} needs {package.replace('_', '-')}, which is not "
                f"installed; run: {packages.install(extra)}, or leave {key} out"
            )


# Where the folder of an adapter belongs that stands where a model should.
ADAPTER_CURES = {
    "model_name_or_path": "name it in adapter_name_or_path, and its base here",
    "ref_model": "name it in ref_model_adapters, and its base here",
    "critic_model": "merge it with fastppo-export, and name the model that it writes",
}


def looks_local(name: str) -> bool:
    """Whether a name is a local path and not a repository on the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def check_download(config: Config, key: str, name: str, file: str, revision: str = "main") -> None:
    """Check that the hub or its cache has the model or adapter `name`."""
    where = f"{config.source}: {key}:"
    downloads.check_download(where, name, file, revision=revision, cache_dir=config.cache_dir)


def check_model(config: Config, key: str) -> None:
    """Check that a local model folder holds a model, and that one on the hub is there."""
    name = getattr(config, key)
    if name is None:
        return
    if not looks_local(name):
        gguf = config.model_gguf_file if key == "model_name_or_path" else None
        revision = config.model_revision if key == "model_name_or_path" else "main"
        check_download(config, key, name, gguf or "config.json", revision)
        return
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(
            f"{config.source}: {key}: no folder {name}; check the path, or name a model on the hub "
            "as owner/name"
        )
    gguf = config.model_gguf_file if key == "model_name_or_path" else None
    if gguf and not (folder / gguf).is_file():
        raise UserError(f"{config.source}: model_gguf_file: no {gguf} in {name}; check its name")
    if not (folder / "config.json").is_file() and not gguf:
        if (folder / ADAPTER).is_file():
            heads = (*HEAD_FILES, SAFETENSORS, BIN)
            if key == "critic_model" and any((folder / head).is_file() for head in heads):
                return  # its head is looked for when it is loaded
            raise UserError(f"{config.source}: {key}: {name} is an adapter; {ADAPTER_CURES[key]}")
        raise UserError(
            f"{config.source}: {key}: {name} has no config.json; name a folder that "
            "save_pretrained wrote"
        )


def check_adapters(config: Config, key: str) -> None:
    """Check that each local adapter of a comma-separated list is a folder that PEFT wrote."""
    names = getattr(config, key)
    for name in [] if names is None else split(names):
        folder = Path(name)
        if not folder.is_dir():
            if folder.parent.is_dir():  # owner/name on the hub has no such parent
                raise UserError(f"{config.source}: {key}: no folder {folder}; check the path")
            check_download(config, key, name, ADAPTER)
            continue
        read = folder / "adapter_config.json"
        weights = [folder / f"adapter_model.{end}" for end in ("safetensors", "bin")]
        if not read.is_file() and (folder / "config.json").is_file():
            model = "ref_model" if key == "ref_model_adapters" else "model_name_or_path"
            raise UserError(
                f"{config.source}: {key}: {folder} is a whole model, not an adapter; name it in "
                f"{model}, and leave {key} out"
            )
        if not read.is_file() or not any(path.is_file() for path in weights):
            raise UserError(
                f"{config.source}: {key}: {folder} has no adapter (adapter_config.json and "
                "adapter_model.safetensors); name a folder that PEFT wrote"
            )
        read_json(read, f"{config.source}: {key}")
    if names is not None:
        base = config.model_name_or_path if key != "ref_model_adapters" else config.ref_model
        check_below(config.source, key, str(base), split(names))


def check_rewards(config: Config) -> None:
    """Check local rewards; URLs and function names were checked with the YAML."""
    for spec in config.rewards:
        if spec.kind == "lora":
            check_reward_adapter(config, spec.target)
        elif spec.kind == "full" and spec.target not in config.objects.rewards:
            check_reward_full(config, spec.target)


def check_reward_full(config: Config, name: str) -> None:
    """Check that a local `full` reward is an LM with a value head or a one-label classifier."""
    adapters = split(config.reward_model_adapters) if config.reward_model_adapters else []
    for key, folder in [("reward_model", name), *(("reward_model_adapters", x) for x in adapters)]:
        file = "config.json" if key == "reward_model" else ADAPTER
        if looks_local(folder) and not (Path(folder) / file).is_file():
            raise UserError(
                f"{config.source}: {key}: {folder} has no {file}; {cure_of_full(folder, key)}"
            )
        if not looks_local(folder):
            check_download(config, key, folder, file)
    check_below(config.source, "reward_model_adapters", name, adapters)
    path = Path(name) / "config.json"
    if not path.is_file():
        return
    data = read_json(path, f"{config.source}: reward_model")
    if any((Path(f) / head).is_file() for f in (name, *adapters[-1:]) for head in HEAD_FILES):
        return
    if adapters:
        return  # the head may be theirs
    shapes = folder_shapes(Path(name))
    head = None if shapes is None else find_head(shapes, data.get("value_head_prefix"))
    if head is not None:  # the weights know better than the config
        count = head.rows
    elif shapes is None and weight_files(Path(name)):
        return  # a .bin is read by torch, which is not here yet
    else:
        classes = data.get("architectures")
        first = str(classes[0]) if isinstance(classes, list) and classes else None
        if first is not None and "SequenceClassification" not in first:
            raise UserError(
                f"{config.source}: reward_model: {name} is a {first} without "
                f"{' or '.join(HEAD_FILES)}; name a sequence classifier with one label, or a model "
                "with its value head"
            )
        labels = data.get("id2label")
        # What a classifier's file does not say is 2 in transformers.
        count = len(labels) if isinstance(labels, dict) else data.get("num_labels", 2)
    if count != 1:
        raise UserError(
            f"{config.source}: reward_model: {name} has {count} labels, and a score is one number; "
            "name a classifier with num_labels 1"
        )


def cure_of_full(folder: str, key: str) -> str:
    """What to do about a folder that is no model, or no adapter, under reward_model_type: full."""
    if key == "reward_model" and (Path(folder) / ADAPTER).is_file():
        if any((Path(folder) / head).is_file() for head in HEAD_FILES):
            return "it is an adapter with a value head, which is reward_model_type: lora"
        return "it is an adapter: name its base here, and the adapter in reward_model_adapters"
    if key == "reward_model_adapters" and (Path(folder) / "config.json").is_file():
        return "it is a whole model: name it in reward_model, and leave reward_model_adapters out"
    return "check the path, or name one on the hub as owner/name"


def check_reward_adapter(config: Config, name: str) -> None:
    """Check that a `lora` reward has an adapter and a head of the base's hidden size."""
    where, folder = f"{config.source}: reward_model", Path(name)
    if not folder.is_dir():
        raise UserError(f"{where}: no folder {name}; {cure_of_lora(folder, name)}")
    for names, what in (
        ((ADAPTER,), "adapter"),
        (("adapter_model.safetensors", "adapter_model.bin"), "adapter"),
    ):
        if not any((folder / name).is_file() for name in names):
            raise UserError(
                f"{where}: {folder} has no {what} ({names[0]}); {cure_of_lora(folder, name)}"
            )
    settings = read_json(folder / ADAPTER, where)
    if not any((folder / name).is_file() for name in (*HEAD_FILES, SAFETENSORS, BIN)):
        if settings.get("task_type") == "SEQ_CLS":
            base = settings.get("base_model_name_or_path") or "its base"
            raise UserError(
                f"{where}: {folder} is an adapter of a sequence classifier (SEQ_CLS), whose head "
                f"is within it; use reward_model_type: full, with reward_model: {base} and "
                f"reward_model_adapters: {folder}"
            )
        raise UserError(
            f"{where}: {folder} has no value head ({HEAD_FILES[0]}), so it scores nothing; train a "
            "reward model with stage: rm and name its output_dir"
        )
    if durable.stage_of(folder) == "ppo":
        raise UserError(
            f"{where}: {folder} is a policy that stage ppo wrote, with its critic's head; name the "
            "output_dir of stage rm"
        )
    if not (folder / HEAD_FILES[0]).is_file():
        return  # a .bin is read by torch, which is not here yet
    head = head_size(folder / HEAD_FILES[0], config.source)
    base = hidden_size(config)
    if base is not None and head != base:
        raise UserError(
            f"{config.source}: reward_model: the head in {folder} is for hidden size {head}, and "
            f"{config.model_name_or_path} has {base}; train the reward model on the same base"
        )


def cure_of_lora(folder: Path, name: str) -> str:
    """What to do about a folder that is no adapter, under reward_model_type: lora."""
    if (folder / "config.json").is_file():
        return (
            "it is a whole model: use reward_model_type: full, or name the adapter that was "
            "trained on model_name_or_path"
        )
    if "://" in name:
        return "for a server set reward_model_type: api"
    if ":" in name:
        return "for a function set reward_model_type: function"
    if folder.exists():
        return "train one with stage: rm and name its output_dir"
    if name.count("/") == 1 and not looks_local(name):
        return (
            "stage rm writes one, into its output_dir: run that first, or check the path; one on "
            f"the hub comes with `hf download {name} --local-dir {name}`"
        )
    return "stage rm writes one, into its output_dir: run that first, or check the path"


def head_size(path: Path, source: str) -> int:
    """Hidden size that a value head was made for, from the safetensors header alone."""
    try:
        return int(read_header(path)["v_head.summary.weight"]["shape"][-1])
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"{source}: reward_model: {path} has no v_head.summary.weight; train one with stage: rm"
        ) from None


def hidden_size(config: Config) -> int | None:
    """Width of the base's last hidden state, or None if its config.json is not local."""
    path = Path(config.model_name_or_path) / "config.json"
    if not path.is_file():
        return None
    data = read_json(path, f"{config.source}: model_name_or_path")
    size = hidden_width(data)
    if size is not None and not isinstance(size, int):
        raise UserError(
            f"{config.source}: model_name_or_path: hidden_size in {path} is {size!r}; mend it"
        )
    return size


def check_output_dir(config: Config) -> None:
    """Refuse to write into the folder of an earlier run without `overwrite_output_dir`."""
    folder = Path(config.output_dir)
    places = {"output_dir": folder}
    if config.stage == "ppo":
        places["metrics_dir"] = Path(config.metrics_dir)
    for key, place in places.items():
        for above in (place, *place.parents):
            if above.exists() and not above.is_dir():
                raise UserError(f"{config.source}: {key}: {above} is a file; name a folder")
    adapters = [] if config.adapter_name_or_path is None else split(config.adapter_name_or_path)
    sources = [
        ("model_name_or_path", config.model_name_or_path),
        ("ref_model", config.ref_model),
        ("critic_model", config.critic_model),
        *(("reward_model", spec.target) for spec in config.rewards if spec.kind != "api"),
        *(("adapter_name_or_path", name) for name in adapters if config.trains),
    ]
    for key, name in sources:
        if name and Path(name).exists() and Path(name).resolve() == folder.resolve():
            raise UserError(f"{config.source}: output_dir: is {key} itself; name another")
    durable.checkpoint_to_resume(config, hashes=False)
    allowed = config.overwrite_output_dir or config.resume_from_checkpoint or not config.trains
    if not allowed and folder.is_dir() and any(folder.iterdir()):
        cure = "name another, or set overwrite_output_dir: true"
        if any(folder.glob("checkpoint-*")):
            cure = "set resume_from_checkpoint: true to go on with the run in it, or " + cure
        raise UserError(f"{config.source}: output_dir: {folder} is not empty; {cure}")
