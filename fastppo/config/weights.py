"""Names and shapes of the weights in a folder's files, and the head among them. No torch here.

A config.json may be silent about a head; the weights are not, so they are believed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Shapes = Mapping[str, tuple[int, ...]]

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"
INDEX = ".index.json"
# Modules that give the score, by the name that each library saves them under: transformers' and
# TRL's classifiers, OpenRLHF's value_head_prefix, TRL's and LLaMA-Factory's models with a value
# head, and names that people chose.
HEAD_MODULES = (
    "score",
    "classifier.out_proj",
    "classifier",
    "classification_head.out_proj",
    "v_head.summary",
    "v_head",
    "value_head.summary",
    "value_head",
    "reward_head",
    "regression_head",
    "rm_head",
)


class Head(NamedTuple):
    """A linear layer that gives scores: the names of its tensors, and how many scores it gives."""

    module: str
    weight: str
    bias: str | None
    rows: int


def weight_files(folder: Path) -> list[Path]:
    """The files with a model's weights, safetensors before .bin as transformers chooses them."""
    for name in (SAFETENSORS, BIN):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}{INDEX}"
        if index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                return [folder / file for file in sorted(set(names)) if (folder / file).is_file()]
            except (OSError, ValueError, LookupError, AttributeError, TypeError):
                return []
    return []


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a safetensors file, from its header alone.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        return {
            name: tuple(int(size) for size in entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, LookupError, TypeError, AttributeError, struct.error, ValueError) as error:
        raise ValueError(f"{path} is no safetensors file ({error})") from None


def folder_shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of a local model's weights; None where only torch could read them."""
    files = weight_files(folder)
    if not files or any(path.suffix != ".safetensors" for path in files):
        return None
    try:
        return {name: shape for path in files for name, shape in safetensors_shapes(path).items()}
    except ValueError:
        return None  # transformers says what is wrong with it


def find_head(shapes: Shapes, prefix: str | None = None) -> Head | None:
    """The head among these weights, or None.

    Args:
        shapes: of every tensor; names may have a wrapper's prefix, as in an adapter's file.
        prefix: what the config calls its module (OpenRLHF's value_head_prefix).
    """
    for module in ([prefix] if prefix else []) + list(HEAD_MODULES):
        for name, shape in shapes.items():
            full = name.removesuffix(".weight")
            if full == name or len(shape) != 2 or not is_module(full, module):
                continue
            bias = f"{full}.bias"
            return Head(full, name, bias if bias in shapes else None, shape[0])
    return None


def is_module(full: str, module: str) -> bool:
    """Whether `full` is the head `module`, alone or in a wrapper, and not a part of a layer."""
    if full == module:
        return True
    return full.endswith(f".{module}") and not any(part.isdigit() for part in full.split("."))


def few(names: Iterable[str]) -> str:
    """Some names for a message: the first, and how many more."""
    found = sorted(names)
    return found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"
