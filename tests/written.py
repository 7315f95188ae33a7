"""What LLaMA-Factory leaves in an output folder, and how tests read it."""

from __future__ import annotations

import json
from pathlib import Path

LF_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "all_results.json",
    "chat_template.jinja",
    "eval_results.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "train_results.json",
    "trainer_log.jsonl",
    "trainer_state.json",
    "value_head.safetensors",
}


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
