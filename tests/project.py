"""A small project of a user's, every part of it valid, for tests to break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastppo import toy
from fastppo.config import config_from_dict
from fastppo.data import Record, Records, read_records
from fastppo.run.launch import SIZES
from fastppo.templates import Template, get_template

PROMPTS = [{"instruction": f"Say {i}", "output": "unused"} for i in range(4)]
PAIRS = [{"instruction": f"Say {i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
INFO = {
    "prompts": {"file_name": "prompts.json"},
    "pairs": {"file_name": "pairs.json", "ranking": True},
    "chats": {"file_name": "chats.json", "formatting": "sharegpt"},
    "gone": {"file_name": "gone.json"},
}
PPO = {
    "stage": "ppo",
    "model_name_or_path": "./model",
    "reward_model": "reward",
    "dataset": "prompts",
    "template": "chatml",
    "output_dir": "out",
}
RM = {**{k: v for k, v in PPO.items() if k != "reward_model"}, "stage": "rm", "dataset": "pairs"}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def records(
    project: Path, rows: Any = None, info: dict[str, Any] | None = None, **changes: Any
) -> Records:
    """Read `rows` as a data set that `info` describes."""
    if rows is not None:
        write_json(project / "data" / "rows.json", rows)
        describe(project, rows={"file_name": "rows.json", **(info or {})})
        changes = {"dataset": "rows", **changes}
    base = RM if (info or {}).get("ranking") else PPO
    return read_records(config_from_dict({**base, **changes}))


def describe(project: Path, **entries: dict[str, Any]) -> None:
    """dataset_info.json with these entries."""
    write_json(project / "data" / "dataset_info.json", entries)


def asked(found: list[Record]) -> list[str]:
    """The last questions."""
    return [record.messages[-1]["content"] for record in found]


@pytest.fixture(scope="session")
def chatml() -> Template:
    return get_template("chatml", toy.byte_tokenizer())


def write_head(folder: Path, size: int) -> None:
    tensors = {
        "v_head.summary.weight": np.zeros((1, size), np.float32),
        "v_head.summary.bias": np.zeros(1, np.float32),
    }
    save_file(tensors, folder / "value_head.safetensors")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the test."""
    monkeypatch.chdir(tmp_path)
    for name in ("ALLOW_EXTRA_ARGS", *SIZES):
        monkeypatch.delenv(name, raising=False)
    for name in ("model", "data", "reward"):
        (tmp_path / name).mkdir()
    write_json(tmp_path / "model" / "config.json", {"hidden_size": 32})
    write_json(tmp_path / "data" / "dataset_info.json", INFO)
    write_json(tmp_path / "data" / "prompts.json", PROMPTS)
    write_json(tmp_path / "data" / "pairs.json", PAIRS)
    turns = [{"from": "human", "value": "Hi"}]
    write_json(tmp_path / "data" / "chats.json", [{"conversations": turns}])
    (tmp_path / "reward" / "adapter_config.json").write_text("{}")
    (tmp_path / "reward" / "adapter_model.safetensors").write_bytes(b"")
    write_head(tmp_path / "reward", 32)
    return tmp_path
