"""Checkpoints of TRL's AutoModelForCausalLMWithValueHead, by its own class.

    python -m tests.peers.value_head write FOLDER MODEL whole|PEFT
    python -m tests.peers.value_head read FOLDER

It runs in an environment that has the class. `write` saves a checkpoint with a random head, and a
random adapter; both print the values of IDS as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

IDS = [[5, 6, 7, 8]]


def values(model: Any) -> list[float]:
    """The head's value at each token."""
    with torch.no_grad():
        _, _, found = model.eval()(torch.tensor(IDS))
    return found[0].tolist()  # type: ignore[no-any-return]


def read(folder: str) -> Any:
    from trl import AutoModelForCausalLMWithValueHead

    return AutoModelForCausalLMWithValueHead.from_pretrained(folder)


def write(folder: str, base: str, kind: str) -> Any:
    from trl import AutoModelForCausalLMWithValueHead

    torch.manual_seed(3)
    settings = {}
    if kind == "PEFT":
        from peft import LoraConfig

        settings["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, **settings)
    Path(folder).mkdir()  # beside an adapter TRL writes the head before there is a folder
    model.save_pretrained(folder)
    return model


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    print(json.dumps(values(write(*given) if what == "write" else read(*given))))
