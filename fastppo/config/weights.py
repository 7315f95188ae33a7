"""Names and shapes of the weights in a model's folder, and the scoring head among them.

A config.json may not mention a head, so the weights decide. This module imports no torch.
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
# Names under which the module that computes the score is saved: by the classifiers of transformers
# and TRL, by OpenRLHF (value_head_prefix), by the models with a value head of TRL and
# LLaMA-Factory; and other common names.
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
    """A linear layer that computes scores: the names of its tensors, and the number of scores."""

    module: str
    weight: str
    bias: str | None
    rows: int


def weight_files(folder: Path) -> list[Path]:
    """The files with a model's weights; as in transformers, safetensors are preferred to .bin."""
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
    """Name and shape of each tensor of a safetensors file, read from its header.

    Raises:
        ValueError: the file is not a safetensors file.
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
    """Name and shape of each weight of a local model; None if only torch can read its files."""
    files = weight_files(folder)
    if not files or any(path.suffix != ".safetensors" for path in files):
        return None
    try:
        return {name: shape for path in files for name, shape in safetensors_shapes(path).items()}
    except ValueError:
        return None  # whoever loads the model reports what is wrong with it


def find_head(shapes: Shapes, prefix: str | None = None) -> Head | None:
    """The scoring head among these weights, or None.

    Args:
        shapes: name -> shape; names may begin with the name of a wrapper, as in an adapter's file.
        prefix: the name that the config gives the head's module (OpenRLHF's value_head_prefix).
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
    """Whether `full` is the head `module`, perhaps in a wrapper, and not a part of a layer."""
    if full == module:
        return True
    return full.endswith(f".{module}") and not any(part.isdigit() for part in full.split("."))


def few(names: Iterable[str]) -> str:
    """Names as text for a message: the first one, and the number of the others."""
    found = sorted(names)
    return found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"
