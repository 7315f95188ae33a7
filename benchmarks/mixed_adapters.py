"""Four roles in one forward, by PEFT's `adapter_names=`, against a pass for each.

A model of SmolLM2-135M's shape with random weights, three adapters of rank 8 and the base without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Case, Contender

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
QUICK = {**SMOLLM2, "vocab_size": 64, "hidden_size": 72, "intermediate_size": 96}
ROLES = ("actor", "critic", "reward", "__base__")  # PEFT's name for no adapter
SIZES = ((1, 96), (4, 96), (16, 96))


def cases(quick: bool) -> Iterator[Case]:
    """Rows of equal length: padding is no part of it."""
    model = make_model({**QUICK, "num_hidden_layers": 2} if quick else SMOLLM2)
    for rows, length in ((2, 5),) if quick else SIZES:
        yield make_case(model, rows, length)


def make_model(shape: dict[str, Any]) -> PeftModel:
    """Adapters whose B is not 0, so that roles differ."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name=ROLES[0])
    for name in ROLES[1:3]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def make_case(model: PeftModel, rows: int, length: int) -> Case:
    """Last hidden states of all roles, (4, rows, length, D)."""
    base = model.get_base_model()
    ids_BT = torch.randint(2, base.config.vocab_size, (rows, length))

    @torch.no_grad()
    def passes() -> list[Tensor]:
        found = []
        for role in ROLES[:3]:
            model.set_adapter(role)
            found.append(base.model(input_ids=ids_BT, use_cache=False).last_hidden_state)
        with model.disable_adapter():
            found.append(base.model(input_ids=ids_BT, use_cache=False).last_hidden_state)
        return found

    names = [role for role in ROLES for _ in range(rows)]
    hidden: list[Tensor] = []

    @torch.no_grad()
    def together() -> list[Tensor]:
        hidden.clear()
        # Adapter names are taken by the PEFT model's own forward alone; one position of the head.
        handle = base.model.norm.register_forward_hook(lambda *given: hidden.append(given[2]))
        try:
            model(
                input_ids=ids_BT.repeat(len(ROLES), 1),
                adapter_names=names,
                use_cache=False,
                logits_to_keep=1,
            )
        finally:
            handle.remove()
        return list(hidden[0].chunk(len(ROLES)))

    case = Case(
        fields={"op": "four roles", "shape": f"{rows} rows of {length}", "dtype": "float32"},
        want=passes(),
        tolerance=1e-3,
    )
    case.add(Contender("a pass a role", passes, passes, ours=True))
    case.add(Contender("adapter_names, one pass", together, together))
    return case
