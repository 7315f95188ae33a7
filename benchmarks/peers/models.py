"""A model's folder as the versions of libraries in the peers' environments read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def linked(model: Path, folder: Path) -> Path:
    """`folder`, which is made anew, gets a model whose files are links to those of `model`."""
    if not (model / "model.safetensors").is_file():
        raise SystemExit(f"benchmarks: {model} is not there; run python examples/demo_model.py")
    shutil.rmtree(folder, ignore_errors=True)
    place = folder / "model"
    place.mkdir(parents=True)
    for path in model.iterdir():
        (place / path.name).symlink_to(path.resolve())
    return place


def for_transformers_4(folder: Path) -> None:
    """Write the names by which transformers 4 knows the rotary embedding's base and the tokenizer.

    It would silently take others. Files that are links become files of their own.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["torch_dtype"] = config["dtype"]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := tokenizer.pop("extra_special_tokens", None), list):
        tokenizer["additional_special_tokens"] = extra
    for name, value in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
