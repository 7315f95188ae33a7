"""What a model's files hold (shapes, tensors, an adapter, rows of embeddings), and loading them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.peft_utils import find_adapter_config_file

from fastppo.config.weights import (
    BIN,
    INDEX,
    SAFETENSORS,
    few,
    safetensors_shapes,
    weight_files,
)

# The output head of a language model, which a trunk or a classifier does without.
OUTPUT_HEADS = ("lm_head.", "embed_out.", "output.weight")
# Constants that older versions of transformers saved.
CONSTANTS = ("inv_freq", ".attn.bias", "masked_bias", ".attention.bias", "position_ids")
LOADING = threading.Lock()


def from_pretrained(kind: Any, name: str | Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """A model by the transformers class `kind`, and which weights were missing or left over.

    Weights of another shape are listed there too. One thread loads at a time: while it makes a
    model, transformers has other functions in place of its own, `tie_weights` among them. Two
    threads at once would leave them there, and no later model would have tied embeddings.
    """
    with LOADING:
        model, info = kind.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    return model, info


def model_folder(name: str, cache_dir: str | None = None) -> Path | None:
    """The folder with a model's weights: `name` itself, or where the hub's files are kept."""
    if Path(name).is_dir():
        return Path(name)
    how: dict[str, Any] = {"cache_dir": cache_dir, "_raise_exceptions_for_missing_entries": False}
    for file in (SAFETENSORS, BIN):
        found = cached_file(name, file, **how)
        if found is None:
            found = cached_file(name, file + INDEX, **how)
            if found is not None:
                get_checkpoint_shard_files(name, found, cache_dir=cache_dir)
        if found is not None:
            return Path(found).parent
    return None


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a .bin file, mapped and not read; a pickle that would run code is refused."""
    mapped = is_zipfile(path)  # what older versions of torch saved cannot be
    found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    return found


def shapes_of(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in these files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        if path.suffix == ".safetensors":
            shapes |= safetensors_shapes(path)
        else:
            shapes |= {name: tuple(x.shape) for name, x in read_file(path).items()}
    return shapes


def model_shapes(folder: Path | None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the model in `folder`; none where there are no files."""
    return {} if folder is None else shapes_of(weight_files(folder))


def read_tensor(files: Iterable[Path], name: str) -> Tensor:
    """One tensor of these files, by its name."""
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                if name in file.keys():  # noqa: SIM118 (no dictionary)
                    tensor: Tensor = file.get_tensor(name)
                    return tensor
        elif name in (tensors := read_file(path)):
            return tensors[name].clone()
    raise KeyError(name)


def left_out(unexpected: Iterable[str]) -> list[str]:
    """Of the weights that a model had no place for, those whose loss changes what it computes."""
    return sorted(
        name
        for name in unexpected
        if not name.removeprefix("model.").startswith(OUTPUT_HEADS) and not name.endswith(CONSTANTS)
    )


def left_out_line(name: str, unexpected: Iterable[str], kind: str) -> str | None:
    """A line on the weights of the model `name` that `kind`, its class, had no place for."""
    found = left_out(unexpected)
    if not found:
        return None
    return f"{name} has weights for {few(found)}, which a {kind} has no place for: left out"


def is_adapter(name: str, cache_dir: str | None = None) -> bool:
    """Whether the folder or hub name has an adapter."""
    try:
        return find_adapter_config_file(name, cache_dir=cache_dir) is not None
    except (OSError, ValueError):  # the name can be neither
        return False


def vocabulary_size(own: PretrainedConfig) -> int:
    """Rows of the embeddings of a model with this config; no limit where it does not say."""
    rows = getattr(own.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else sys.maxsize


def forget_pad_token(own: PretrainedConfig) -> bool:
    """Take a padding token out of a model's config that has no row in its embeddings.

    Such as is left where a tokenizer got a token and its model no row for it: PyTorch then refuses
    to make the embeddings. Returns whether there was one.
    """
    text = own.get_text_config()
    pad = getattr(text, "pad_token_id", None)
    if not isinstance(pad, int) or pad < vocabulary_size(own):
        return False
    own.pad_token_id = text.pad_token_id = None
    return True
