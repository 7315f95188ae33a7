"""All that a resumed run needs beside its weights, as tensors (safetensors) and text (JSON).

No pickle: what is read back can be nothing but numbers, strings and the containers below.
transformers' own optimizer.pt and rng_state.pth are pickles.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastppo.durable import TRAINING_STATE

TENSORS = "training_state.safetensors"


def write(tree: Any, folder: Path) -> None:
    """A tree of dicts, lists, tuples, tensors, numbers, strings and None, in two files."""
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
    """The tree again; tensors on the host."""
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


def random_state() -> dict[str, Any]:
    """Every generator that is nobody's own: reward functions and judges may draw from them."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - whoever uses the global one
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest),
        "cpu": torch.get_rng_state(),
        # Of the run's device alone: where it is resumed there may be more of them, or fewer.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put them back where `random_state` found them."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
