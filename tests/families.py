"""docs/models.md, made from the matrix of families:  python -m tests.families > docs/models.md"""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM

from fastppo.config.published import last_position
from fastppo.memory.shapes import FAMILIES as PLANNED
from fastppo.models.adapters import linear_layers
from tests import zoo

# transformers has no classifier of these: their reward models are not exported, in one line.
NO_CLASSIFIER = ("cohere2", "granite")

INTRODUCTION = """# Models

Each of these {count} families goes all the way in a test, as a tiny random model of its own
(`tests/models/test_families.py`): stage rm; stage ppo with LoRA and that reward model, and with
`finetuning_type: full` and a shared critic; resume, which ends in the same bits; export, and
transformers loading it. Log-probs of sampler, policy and reference, values and scores are those of
transformers' own forward, one sequence at a time, to 2e-4. Another family of transformers' causal
language models works where its logits are its head's, scaled or softcapped, of its last hidden
state; a run looks before it trains, and stops in one line where they are not.

- LoRA: what `lora_target: all` adapts. Experts of a mixture lie in one tensor and take no adapter;
  a run says how much of the model that is.
- Reward export: whether `fastppo-export` makes a classifier of a reward model; where transformers
  has no classifier of the family it says so, and the adapter and its head are used as they are.
- Plan: whether `--plan` and keys that are `auto` know the layers. Where not, a line says so, and
  such a key needs a value.
- Positions: the config's key, where they end. A `cutoff_len` and `max_new_tokens` past them are
  refused before anything is loaded; other families go on, with a note past their training.

| `model_type` | trait | LoRA | reward export | plan | positions |
|---|---|---|---|---|---|
"""
END = """
A multimodal model trains on text: adapters, `freeze` and `full` are of its text model, and towers
for images stay as they are. The width of a value head is that of what the output head takes.
"""


def row(family: str) -> str:
    """A family's line of the table."""
    config = zoo.config_of(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(model))
    last = last_position(json.loads(config.to_json_string()))
    cells = [
        f"`{config.model_type}`",
        zoo.FAMILIES[family][0] or "-",
        ", ".join(names),
        "no" if family in NO_CLASSIFIER else "yes",
        "yes" if config.model_type in PLANNED else "no",
        f"end: `{last[0]}`" if last else "go on",
    ]
    return "| " + " | ".join(cells) + " |\n"


def page() -> str:
    """The whole page."""
    return INTRODUCTION.format(count=len(zoo.FAMILIES)) + "".join(map(row, zoo.FAMILIES)) + END


if __name__ == "__main__":
    print(page(), end="")
