"""A small project of a user's, every part of it valid, for tests to break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

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
    monkeypatch.delenv("ALLOW_EXTRA_ARGS", raising=False)
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
