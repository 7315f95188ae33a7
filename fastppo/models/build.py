"""Four roles, one base: the models, adapters and heads that a configuration asks for.

| role      | weights                                                             | trains |
|-----------|---------------------------------------------------------------------|--------|
| actor     | base + LoRA `default`; or the base itself (freeze, full)            | yes    |
| reference | base, adapters off; or the SFT adapter, the base or a model, frozen | no     |
| reward    | base + LoRA `reward` + head; or whatever else gives a score         | no     |
| critic    | base + LoRA `critic` + head, a head on the actor, or a model + head | yes    |
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastppo.config.memory import reference_streams
from fastppo.config.rewards import HEAD_FILES, RECORD
from fastppo.models.adapters import (
    adapter_parameters,
    adapter_to_continue,
    adapters_to_merge,
    add_adapter,
    comma_list,
    create_peft_model,
    disable_input_cast,
    frozen_copy,
    load_adapter,
    load_peft_model,
    merge_adapters,
    round_outputs_to_bfloat16,
    setup_lora_tuning,
    setup_weight_tuning,
    upcast_trainable,
)
from fastppo.models.load import (
    causal_lm,
    check_same_tokens,
    compute_dtype,
    disable_dropout,
    hidden_size,
    load_base,
    wrap_activations,
)
from fastppo.models.roles import Place, Role, Roles
from fastppo.models.value_head import load_value_head, new_value_head
from fastppo.offload.frozen import place_frozen

if TYPE_CHECKING:
    from fastppo.config import Config

__all__ = ["Role", "Roles", "build"]


@dataclass
class RolesBuilder:
    """The places while adapters are still being hung: PEFT replaces parameters as it goes."""

    config: Config
    device: torch.device
    drafts: dict[str, tuple[nn.Module, str | None, str]] = field(default_factory=dict)
    whole: dict[str, list[nn.Parameter]] = field(default_factory=dict)  # trained without adapter
    reward_heads: dict[str, nn.Linear] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def place(self, role: str) -> Place:
        """The finished place; actor and critic train, a critic on the actor's trunk its head."""
        model, adapter, words = self.drafts[role]
        trained = self.whole.get(role, [])
        if role in ("actor", "critic") and adapter is not None:
            trained = adapter_parameters(model, adapter)
        return Place(model, adapter, words, tuple(trained))


def build(config: Config, device: torch.device) -> Roles:
    """Load what the configuration names, once each, and place the four roles on it."""
    draft = RolesBuilder(config, device)
    base = load_base(config, device, bits=config.quantization_bit)
    if config.quantization_bit == 8:
        draft.notes.append(
            "quantization_bit: 8 picks outlier columns by batch on a GPU, so log-probs change with "
            "the micro-batch and the first ratios are not exactly 1; 4 has no such effect"
        )
    if config.finetuning_type == "lora":
        place_on_adapters(draft, base)
    else:
        place_on_weights(draft, base)
    if config.ref_model is not None:
        place_reference_model(draft, config.ref_model)
    critic_head = place_critic(draft) if config.has_critic else None
    for model in {id(model): model for model, _, _ in draft.drafts.values()}.values():
        disable_dropout(model)
        disable_input_cast(model)
        if not is_in_place(causal_lm(model)):
            model.to(device)
        model.eval()
    places = {role: draft.place(role) for role in draft.drafts}
    for place in places.values():
        if place.adapter is not None:
            round_outputs_to_bfloat16(place.model, place.trainable)
        upcast_trainable(place.trainable)
    for place in places.values():
        if place.trainable:
            wrap_activations(config, causal_lm(place.model))
    autocast = compute_dtype(config, device) == torch.bfloat16
    if autocast and not config.bf16:
        draft.notes.append(
            "bf16 is not set, and on a GPU a base in 16 bits then stays so: this run is in bfloat16"
        )
    return Roles(
        places, draft.reward_heads, critic_head, device, autocast=autocast, notes=draft.notes
    )


def is_in_place(base: nn.Module) -> bool:
    """Whether a model is where it belongs: quantised on the device, or passing through it."""
    return getattr(base, "is_quantized", False) or hasattr(base, "streamed")


def place_on_adapters(draft: RolesBuilder, base: nn.Module) -> None:
    """`finetuning_type: lora`: actor, reference and lora rewards as adapters on one base."""
    config = draft.config
    model = setup_lora_tuning(config, base)
    below = adapters_to_merge(config)
    words = f"base + {' + '.join(below)}" if below else "base"
    draft.drafts["actor"] = (model, "default", f"{words} + LoRA 'default'")
    if below:
        draft.notes.append(
            f"{', '.join(below)} became part of the base; what is saved goes on top of that: "
            "load it with adapter_name_or_path: " + ",".join([*below, config.output_dir])
        )
    sft = adapter_to_continue(config)
    if sft is None:
        draft.drafts["reference"] = (model, None, f"{words}, adapters off")
    else:
        draft.drafts["actor"] = (model, "default", f"{words} + LoRA 'default' from {sft}")
        if config.ref_model is None:
            key = "adapter_name_or_path"
            load_adapter(model, sft, "reference", key, torch_device=str(draft.device))
            draft.drafts["reference"] = (model, "reference", f"{words} + {sft}, frozen")
            draft.notes.append(
                f"the reference is {sft} as it is now, where the policy starts and KL is 0; "
                "LLaMA-Factory's would be the base without it"
            )
    for role, folder in config.reward_adapters.items():
        # Frozen, so it stays in the base's dtype instead of PEFT's float32.
        load_adapter(
            model,
            folder,
            role,
            "reward_model",
            autocast_adapter_dtype=False,
            torch_device=str(draft.device),
        )
        head = load_value_head(Path(folder), hidden_size(model), draft.device)
        draft.drafts[role] = (model, role, f"{words} + LoRA '{role}' + head")
        draft.reward_heads[role] = head
        note_other_base(draft, folder, below)


def note_other_base(draft: RolesBuilder, folder: str, below: list[str]) -> None:
    """A reward adapter knows the base that it was trained on, merged adapters included."""
    record = Path(folder) / RECORD
    if not record.is_file():
        return  # LLaMA-Factory's say nothing of it
    try:
        there = json.loads(record.read_text(encoding="utf-8")).get("merged", [])
    except (ValueError, AttributeError):
        return  # the reward that reads its score's place there says what is wrong with it
    if [Path(name).name for name in there] != [Path(name).name for name in below]:
        draft.notes.append(
            f"{folder} was trained on a base with {', '.join(there) or 'nothing'} merged into it, "
            f"and here it is {', '.join(below) or 'nothing'}: its scores can be off; train it with "
            "the same adapter_name_or_path and create_new_adapter"
        )


def place_on_weights(draft: RolesBuilder, base: nn.Module) -> None:
    """`finetuning_type: freeze | full`: the base itself trains, so the reference is a copy of it.

    Frozen layers are in memory once: the copy shares them.
    """
    config = draft.config
    full = config.finetuning_type == "full"
    draft.whole["actor"] = setup_weight_tuning(config, base, config.finetuning_type)
    draft.drafts["actor"] = (base, None, "base" if full else "base, some of its layers")
    if config.ref_model is None:
        words = "frozen copy of the base" if full else "base, frozen copy of those layers"
        draft.drafts["reference"] = (frozen_copy(base), None, words)


def place_reference_model(draft: RolesBuilder, name: str) -> None:
    """`ref_model` with `ref_model_adapters`: a model of its own, frozen."""
    config, bits = draft.config, draft.config.ref_model_quantization_bit
    model = load_base(config, draft.device, name, bits, stay=True)
    check_same_tokens(config, "ref_model", name, model)
    folders = comma_list(config.ref_model_adapters)
    adapter = None
    if bits is None:
        model = merge_adapters(model, folders, "ref_model_adapters")
        streamed, folder = reference_streams(config), config.offload_dir
        model = place_frozen(model, draft.device, streamed=streamed, offload_dir=folder)
    elif folders:  # quantised weights take no merge
        model = load_peft_model(model, folders[0], "ref_model_adapters", train=False)
        adapter = "default"
    draft.drafts["reference"] = (model, adapter, " + ".join([name, *folders]) + ", frozen")


def place_critic(draft: RolesBuilder) -> nn.Linear:
    """The critic's place, and its head: from the reward model, from its folder, or at 0."""
    config = draft.config
    if config.critic == "shared":
        model, adapter, _ = draft.drafts["actor"]
        draft.drafts["critic"] = (model, adapter, "head on the actor")
        return new_value_head(hidden_size(model), draft.device)
    if config.critic == "model":
        return place_critic_model(draft)
    # On what does not move: with freeze and full that is the reference.
    model, _, words = draft.drafts["actor" if config.finetuning_type == "lora" else "reference"]
    head = new_value_head(hidden_size(model), draft.device)
    rewards = config.reward_adapters
    if config.finetuning_type != "lora":
        _, adapter, reference = draft.drafts["reference"]
        if adapter is None:
            model = create_peft_model(config, model, "critic", extras=False)
        else:
            add_adapter(config, model, "critic")
        draft.drafts["reference"] = (model, adapter, reference)
        draft.drafts["critic"] = (model, "critic", "the reference + LoRA 'critic' + head")
        return head
    if rewards:
        role, folder = next(iter(rewards.items()))
        settings = {"is_trainable": True, "torch_device": str(draft.device)}
        load_adapter(model, folder, "critic", "reward_model", **settings)
        if config.value_head_init == "reward":
            head.load_state_dict(draft.reward_heads[role].state_dict())
    else:
        add_adapter(config, model, "critic")
    base_words = words.split(" + LoRA")[0]
    draft.drafts["critic"] = (model, "critic", f"{base_words} + LoRA 'critic' + head")
    return head


def place_critic_model(draft: RolesBuilder) -> nn.Linear:
    """`critic: model`: a model of its own, trained by `critic_finetuning_type`, and its head.

    `critic_model` with the head that lies in it; else a second copy of the base, which starts from
    the reward model where that is an adapter.
    """
    config, name = draft.config, draft.config.critic_model
    kind = config.critic_finetuning_type or config.finetuning_type
    bits = config.quantization_bit if kind == "lora" else None
    model = load_base(config, draft.device, name, bits)
    head = new_value_head(hidden_size(model), draft.device)
    words = name or "a second copy of the base"
    if name is not None:
        check_same_tokens(config, "critic_model", name, model)
        if any((Path(name) / file).is_file() for file in HEAD_FILES):
            head = load_value_head(Path(name), hidden_size(model), draft.device, "critic_model")
    else:
        model = merge_adapters(model, adapters_to_merge(config), "adapter_name_or_path")
        for role, folder in list(config.reward_adapters.items())[:1]:
            model = merge_adapters(model, [folder], "reward_model")
            words += f" + {folder}"
            if config.value_head_init == "reward":
                head.load_state_dict(draft.reward_heads[role].state_dict())
    if kind == "lora":
        model = create_peft_model(config, model, "critic", extras=False)
        draft.drafts["critic"] = (model, "critic", f"{words} + LoRA 'critic' + head")
    else:
        draft.whole["critic"] = setup_weight_tuning(config, model, kind)
        some = "" if kind == "full" else ", some layers"
        draft.drafts["critic"] = (model, None, f"{words}{some} + head")
    return head
