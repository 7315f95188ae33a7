"""All that a resumed run needs beside its weights, as tensors (safetensors) and text (JSON).

No pickle: what is read back can be nothing but numbers, strings and the containers below.
transformers' own optimizer.pt and rng_state.pth are pickles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fastppo.run.durable import TRAINING_STATE

TENSORS = "training_state.safetensors"


def write(tree: Any, folder: Path) -> None:
    """Write a tree of dicts, lists, tuples, tensors, numbers, strings and None as two files."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()

    def encode(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensor = value.detach().contiguous()
            # safetensors takes no two names for the same memory, nor a part of a storage.
            place = tensor.untyped_storage().data_ptr()
            if place in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()
            seen.add(tensor.untyped_storage().data_ptr())
            tensors[name] = tensor
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[key, encode(item, f"{name}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [encode(item, f"{name}.{i}") for i, item in enumerate(value)]
            return {type(value).__name__: items}
        assert value is None or isinstance(value, bool | int | float | str), (name, type(value))
        return value

    structure = encode(tree, "state")
    (folder / TRAINING_STATE).write_text(json.dumps(structure) + "\n", encoding="utf-8")
    save_file(tensors, folder / TENSORS)


def read(folder: Path) -> Any:
    """Read the tree that `write` wrote; its tensors are on the CPU."""
    tensors = load_file(folder / TENSORS)

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: decode(item) for key, item in content}
        items = [decode(item) for item in content]
        return tuple(items) if kind == "tuple" else items

    return decode(json.loads((folder / TRAINING_STATE).read_text(encoding="utf-8")))
