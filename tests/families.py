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

The test `tests/models/test_families.py` takes these {count} model families through a whole run,
each as a tiny model with random weights: stage rm; stage ppo with LoRA and that reward model; stage
ppo with `finetuning_type: full` and a shared critic; a resumed run, which must end with the same
bits; export; and loading the export with transformers. The log-probs of sampler, policy and
reference, the values and the scores must equal those of transformers' own forward, run one sequence
at a time, to 2e-4.

Each family is also sampled greedily with continuous batching, five prompts in three slots
(`tests/ppo/test_sampler.py`): tokens and log-probs must be those of transformers' `generate` on
each prompt alone. Models that cache more than keys and values, such as Mamba, are sampled in
batches ([step.md](step.md)).

Other families of causal language models in transformers work if their logits are those of the
output head on the last hidden state, possibly scaled or softcapped. A run checks this before it
trains, and otherwise stops with one line.

All families of the table run the lowest layers, where roles have no weights of their own, once per
rollout ([step.md](step.md)), which `tests/models/test_shared_layers.py` compares with whole passes.
A model that passes more than hidden states from layer to layer, such as Gemma 3n, runs whole.

The columns of the table:

- LoRA: the layers that `lora_target: all` adapts. The experts of a mixture are one tensor and get
  no adapter; a run prints their share of the parameters.
- Reward export: whether `fastppo-export` can make a classifier of a reward model. If transformers
  has no classifier for the family, the export says so; the adapter and its head can still be used.
- Plan: whether `--plan` and keys that are `auto` know the family's layers. If not, a line says so,
  and a key that is `auto` needs a value.
- Positions: the key of config.json that limits the length of a sequence, if one does. If
  `cutoff_len` and `max_new_tokens` exceed it, the run is refused before anything is loaded. In the
  other families a run prints a note if sequences can be longer than those the model was trained on.

| `model_type` | trait | LoRA | reward export | plan | positions |
|---|---|---|---|---|---|
"""
END = """
A multimodal model is trained on text: adapters, `freeze` and `full` apply to its text model, and
its image towers do not change. A value head is as wide as the input of the output head.
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
        f"`{last[0]}`" if last else "no limit",
    ]
    return "| " + " | ".join(cells) + " |\n"


def page() -> str:
    """The whole page."""
    return INTRODUCTION.format(count=len(zoo.FAMILIES)) + "".join(map(row, zoo.FAMILIES)) + END


if __name__ == "__main__":
    print(page(), end="")
