"""The paths of a configuration made absolute, for processes that start in another folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fastppo.config.rewards import split
from fastppo.data.info import READERS

if TYPE_CHECKING:
    from fastppo.config import Config

# Folders, always.
FOLDERS: Final = (
    "output_dir",
    "metrics_dir",
    "logging_dir",
    "swanlab_logdir",
    "offload_dir",
    "cache_dir",
    "vllm_adapter_dir",
)
# Mappings, too: a path is a text.
FILES: Final = ("fsdp_config",)
# Names on the hub, too: a path is what is there.
MODELS: Final = ("model_name_or_path", "ref_model", "critic_model")
# Lists of such names; among rewards are functions and URLs, too.
LISTS: Final = (
    "adapter_name_or_path",
    "ref_model_adapters",
    "reward_model",
    "reward_model_adapters",
)
# Lists of names in dataset_info.json, too: a path has the extension of a file of data.
DATA: Final = ("dataset", "eval_dataset", "ptx_dataset")


def with_absolute_paths(config: Config) -> Config:
    """`config` with every relative path made absolute, from the working directory."""
    changes: dict[str, str] = {}

    def change(keys: Sequence[str], absolute: Callable[[str], str]) -> None:
        found = {key: getattr(config, key) for key in keys}
        texts = {key: text for key, text in found.items() if isinstance(text, str)}
        changes.update({key: absolute(text) for key, text in texts.items()})

    change((*FOLDERS, *FILES), os.path.abspath)
    if not config.dataset_dir.startswith(("ONLINE", "REMOTE:")):
        change(["dataset_dir"], os.path.abspath)
    change(MODELS, lambda name: os.path.abspath(name) if os.path.exists(name) else name)
    change(LISTS, lambda names: absolute_in(names, os.path.exists))
    change(DATA, lambda names: absolute_in(names, is_data_file))
    return config.model_copy(update=changes)


def absolute_in(names: str, is_path: Callable[[str], bool]) -> str:
    """A comma-separated list in which each path is absolute."""
    return ",".join(os.path.abspath(x) if is_path(x) else x for x in split(names))


def is_data_file(name: str) -> bool:
    """Whether the name of a data set is a path."""
    return Path(name).suffix.removeprefix(".").lower() in READERS
