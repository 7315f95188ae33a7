"""Sizes that are known before anything is loaded, compared: positions, and adapters on their base.

Only headers and config.json files are read. What is not there yet, or is another program's format,
is left to whoever loads it.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.config.published import check_last_position
from fastppo.config.rewards import HEAD_FILES, split
from fastppo.errors import UserError

if TYPE_CHECKING:
    from fastppo.config import Config

LONGEST_HEADER = 100 << 20  # bytes: safetensors' own limit
FLOATS = ("F64", "F32", "F16", "BF16")  # quantised weights are stored in other shapes


def check_sizes(config: Config) -> None:
    """Raise UserError where two sizes disagree that the run needs to agree."""
    check_positions(config)
    check_adapters_fit(config)


def readers(config: Config) -> dict[str, str]:
    """Setting -> model that reads the policy's own sequences, the policy itself first."""
    found = {"model_name_or_path": config.model_name_or_path}
    if config.stage == "ppo":
        for key in ("ref_model", "critic_model"):
            if (name := getattr(config, key)) is not None:
                found[key] = name
        for spec in config.rewards:
            if spec.kind == "full" and any((Path(spec.target) / f).is_file() for f in HEAD_FILES):
                found["reward_model"] = spec.target
    return found


def check_positions(config: Config) -> None:
    """Compare the longest sequence with the positions of each local model that reads it."""
    for key, name in readers(config).items():
        try:
            text = (Path(name) / "config.json").read_text(encoding="utf-8")
            data = json.loads(text)
        except (OSError, ValueError):  # on the hub, or broken: whoever loads it looks
            continue
        if isinstance(data, dict):
            check_last_position(config, key, name, data)


def read_header(path: Path) -> dict[str, Any]:
    """Name -> dtype and shape of each tensor in a safetensors file, from its header alone.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
        except struct.error:
            raise ValueError(f"{path} breaks off") from None
        data = json.loads(file.read(length)) if length < LONGEST_HEADER else None
    if not isinstance(data, dict):
        raise ValueError(f"{path} has no header")
    return {name: entry for name, entry in data.items() if name != "__metadata__"}


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the floating-point weights in a folder's safetensors files; may be empty."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            for name, entry in read_header(path).items():
                if entry["dtype"] in FLOATS:
                    shapes[name] = tuple(entry["shape"])
        except (OSError, ValueError, LookupError, TypeError):
            continue  # whoever loads it says what is wrong with it
    return shapes


def check_adapters_fit(config: Config) -> None:
    """Compare the shapes of each adapter with those of the base that it is put on."""
    base = config.model_name_or_path
    pairs = [("adapter_name_or_path", base, config.adapter_name_or_path)]
    if config.stage == "ppo":
        pairs += [("reward_model", base, s.target) for s in config.rewards if s.kind == "lora"]
        if config.ref_model is not None:
            pairs.append(("ref_model_adapters", config.ref_model, config.ref_model_adapters))
    for key, name, adapters in pairs:
        for adapter in split(adapters) if adapters else []:
            check_adapter_fits(config.source, key, adapter, name)


def check_adapter_fits(source: str, key: str, adapter: str, base: str) -> None:
    """Refuse an adapter one of whose matrices is of another size than the base's weight."""
    found = weight_shapes(Path(adapter))
    if not found:
        return
    ends = weight_shapes(Path(base))
    for name, shape in found.items():
        weight = name.removeprefix("base_model.model.")  # as of embeddings that were resized
        wanted = shape
        if ".lora_A." in name:  # (rank, in); its twin is (out, rank)
            twin = found.get(name.replace(".lora_A.", ".lora_B."), ())
            if len(shape) != 2 or len(twin) != 2:
                continue
            wanted, weight = (twin[0], shape[1]), weight.partition(".lora_A.")[0] + ".weight"
        elif ".lora_" in name:
            continue
        own = shape_of(weight, ends)
        # GPT-2's Conv1D has its weight transposed.
        if own is not None and sorted(own) != sorted(wanted):
            raise UserError(
                f"{source}: {key}: {adapter} was trained on a base whose {weight} is "
                f"{by(wanted)}, and that of {base} is {by(own)}; name one that was trained on the "
                "same base"
            )


def shape_of(weight: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of a weight by its name in the loaded model; None where it is not found.

    Files may leave out the name of the trunk, as GPT-2's on the hub do.
    """
    if weight in shapes:
        return shapes[weight]
    return shapes.get(weight.partition(".")[2])


def by(shape: tuple[int, ...]) -> str:
    """A shape in words."""
    return " x ".join(map(str, shape))
