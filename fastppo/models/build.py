"""Build the four roles on one base: the models, adapters and heads of a configuration.

| role      | weights                                                             | trains |
|-----------|---------------------------------------------------------------------|--------|
| actor     | base + LoRA `default`; or the base itself (freeze, full)            | yes    |
| reference | base, adapters off; or the SFT adapter, the base or a model, frozen | no     |
| reward    | base + LoRA `reward` + head; or another model, a server, a function | no     |
| critic    | base + LoRA `critic` + head, a head on the actor, or a model + head | yes    |
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from peft import PeftModel
from torch import nn

from fastppo.config.below import base_of
from fastppo.config.memory import reference_streams
from fastppo.config.rewards import RECORD
from fastppo.errors import UserError
from fastppo.models.adapters import (
    adapter_parameters,
    adapter_to_continue,
    adapters_to_merge,
    add_adapter,
    create_peft_model,
    disable_input_cast,
    experts_note,
    load_adapter,
    load_peft_model,
    merge_adapters,
    setup_lora_tuning,
)
from fastppo.models.given import base_model, copy_adapter, given_adapters, is_new
from fastppo.models.load import (
    autocast_dtype,
    causal_lm,
    check_same_tokens,
    disable_dropout,
    hidden_size,
    text_model,
    wrap_activations,
)
from fastppo.models.roles import Place, Role, Roles
from fastppo.models.value_head import (
    has_value_head,
    load_value_head,
    new_value_head,
    value_head_folder,
)
from fastppo.models.weight_tuning import (
    comma_list,
    frozen_copy,
    round_outputs,
    setup_weight_tuning,
    upcast_trainable,
)
from fastppo.offload.activations import find_layers
from fastppo.offload.frozen import place_frozen

if TYPE_CHECKING:
    from fastppo.config import Config

__all__ = ["Role", "Roles", "build"]


class Assignment(NamedTuple):
    """The model and adapter that a role will run on, before its trainable parameters are known."""

    model: nn.Module
    adapter: str | None  # None: the model has no adapters, or they are off
    words: str  # for the first lines of a run


@dataclass
class RolesBuilder:
    """The roles' assignments while adapters are still being added.

    A Place holds parameters, and PEFT replaces parameters when it adds an adapter, so the places
    are made last.
    """

    config: Config
    device: torch.device
    assigned: dict[str, Assignment] = field(default_factory=dict)
    # For a role without an adapter: the model's own parameters that train
    trainable_weights: dict[str, list[nn.Parameter]] = field(default_factory=dict)
    reward_heads: dict[str, nn.Linear] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def assign(self, role: str, model: nn.Module, adapter: str | None, words: str) -> None:
        """Make `role` run on `model` with `adapter` active."""
        self.assigned[role] = Assignment(model, adapter, words)

    def make_place(self, role: str) -> Place:
        """The role's place with its trainable parameters; only actor and critic have any."""
        model, adapter, words = self.assigned[role]
        trainable = self.trainable_weights.get(role, [])
        if role in ("actor", "critic") and adapter is not None:
            trainable = adapter_parameters(model, adapter)
        return Place(model, adapter, words, tuple(trainable))


def build(config: Config, device: torch.device) -> Roles:
    """Load each model that the configuration names once, and assign the roles to the models."""
    builder = RolesBuilder(config, device)
    bits, waits = config.quantization_bit, config.shards
    base = base_model(config, device, bits=bits, on_host=waits)  # until it is sharded
    builder.notes += experts_note(base, config.finetuning_type)
    if config.finetuning_type == "lora":
        place_on_adapters(builder, base)
    else:
        place_on_weights(builder, base)
    if config.ref_model is not None:
        place_reference_model(builder, config.ref_model)
    critic_head = place_critic(builder) if config.has_critic else None
    for model in {id(model): model for model, _, _ in builder.assigned.values()}.values():
        disable_dropout(model)
        disable_input_cast(model)
        if not waits and not is_in_place(causal_lm(model)):
            model.to(device)
        model.eval()
    places = {role: builder.make_place(role) for role in builder.assigned}
    for place in places.values():
        if place.adapter is not None:
            round_outputs(place.model, place.trainable)
        upcast_trainable(place.trainable)
    for place in places.values():
        if place.trainable:
            wrap_activations(config, causal_lm(place.model))
    autocast = autocast_dtype(config, device)
    if autocast is not None and not (config.bf16 or config.fp16):
        builder.notes.append(
            "bf16 is not set, and on a GPU a base in 16 bits then stays so: this run is in bfloat16"
        )
    return Roles(
        places, builder.reward_heads, critic_head, device, autocast=autocast, notes=builder.notes
    )


def is_in_place(base: nn.Module) -> bool:
    """Whether a model must not be moved: it is quantised, so on the device already; or streamed."""
    return getattr(base, "is_quantized", False) or hasattr(base, "streamed")


def place_on_adapters(builder: RolesBuilder, base: nn.Module) -> None:
    """`finetuning_type: lora`: assign actor, reference and lora rewards to adapters on one base."""
    config = builder.config
    model = setup_lora_tuning(config, base)
    below = adapters_to_merge(config)
    words = f"base + {' + '.join(below)}" if below else "base"
    builder.assign("actor", model, "default", f"{words} + LoRA 'default'")
    if below:
        builder.notes.append(
            f"{', '.join(below)} became part of the base; what is saved goes on top of that: "
            "load it with adapter_name_or_path: " + ",".join([*below, config.output_dir])
        )
    sft, given = adapter_to_continue(config), given_adapters(config)
    if given is not None:
        place_given_reference(builder, given)
    elif sft is None:
        builder.assign("reference", model, None, f"{words}, adapters off")
    else:
        builder.assign("actor", model, "default", f"{words} + LoRA 'default' from {sft}")
        if config.ref_model is None:
            key = "adapter_name_or_path"
            load_adapter(model, sft, "reference", key, torch_device=str(builder.device))
            builder.assign("reference", model, "reference", f"{words} + {sft}, frozen")
            builder.notes.append(
                f"the reference is {sft} as it is now, where the policy starts and KL is 0; "
                "LLaMA-Factory's would be the base without it"
            )
    for role, folder in config.reward_adapters.items():
        # It is frozen, so it keeps the base's dtype; PEFT would make it float32.
        load_adapter(
            model,
            folder,
            role,
            "reward_model",
            autocast_adapter_dtype=False,
            torch_device=str(builder.device),
        )
        head = load_value_head(Path(folder), hidden_size(model), builder.device)
        builder.assign(role, model, role, f"{words} + LoRA '{role}' + head")
        builder.reward_heads[role] = head
        note_other_base(builder, folder, below)


def place_given_reference(builder: RolesBuilder, model: PeftModel) -> None:
    """Assign the reference for a PeftModel: the adapter that was named, or the policy as it is."""
    named = builder.config.objects.ref_adapter
    if named is not None:
        builder.assign("reference", model, named, f"base + LoRA '{named}', frozen")
    elif is_new(model, "default"):
        builder.assign("reference", model, None, "base, adapters off")
    elif builder.config.ref_model is None:
        copy_adapter(model, "default", "reference")
        builder.assign("reference", model, "reference", "base + LoRA 'default' as it is, frozen")


def note_other_base(builder: RolesBuilder, folder: str, below: list[str]) -> None:
    """Add a note if a reward adapter was trained on another base than the one here.

    `below` are the adapters that are merged into the base here; they are compared with those that
    stage rm recorded.
    """
    record = Path(folder) / RECORD
    if not record.is_file():
        return  # LLaMA-Factory records nothing
    try:
        there = json.loads(record.read_text(encoding="utf-8")).get("merged", [])
    except (ValueError, AttributeError):
        return  # read_score_at reports this file when the reward is made
    if [Path(name).name for name in there] != [Path(name).name for name in below]:
        builder.notes.append(
            f"{folder} was trained on a base with {', '.join(there) or 'nothing'} merged into it, "
            f"and here it is {', '.join(below) or 'nothing'}: its scores can be off; train it with "
            "the same adapter_name_or_path and create_new_adapter"
        )


def place_on_weights(builder: RolesBuilder, base: nn.Module) -> None:
    """`finetuning_type: freeze | full`: assign the actor to the base, the reference to a copy.

    The copy shares the frozen layers, so they are in memory only once.
    """
    config = builder.config
    full = config.finetuning_type == "full"
    builder.trainable_weights["actor"] = setup_weight_tuning(config, base, config.finetuning_type)
    builder.assign("actor", base, None, "base" if full else "base, some of its layers")
    if config.ref_model is None:
        words = "frozen copy of the base" if full else "base, frozen copy of those layers"
        builder.assign("reference", frozen_copy(base), None, words)


def place_reference_model(builder: RolesBuilder, name: str) -> None:
    """`ref_model`: assign the reference to a separate frozen model, with `ref_model_adapters`."""
    config, bits = builder.config, builder.config.ref_model_quantization_bit
    model: nn.Module = base_model(config, builder.device, name, bits, key="ref_model", on_host=True)
    check_same_tokens(config, "ref_model", name, model)
    folders = comma_list(config.ref_model_adapters)
    adapter = None
    if bits is None and config.shards:
        model = merge_adapters(model, folders, "ref_model_adapters").requires_grad_(False)
    elif bits is None:
        model = merge_adapters(model, folders, "ref_model_adapters")
        streamed, folder = reference_streams(config), config.offload_dir
        layers = find_layers(text_model(model)) if streamed else None
        model = place_frozen(
            model, builder.device, streamed=streamed, layers=layers, offload_dir=folder
        )
    elif folders:  # adapters cannot be merged into quantised weights
        model = load_peft_model(model, folders[0], "ref_model_adapters", train=False)
        adapter = "default"
    builder.assign("reference", model, adapter, " + ".join([name, *folders]) + ", frozen")


def place_critic(builder: RolesBuilder) -> nn.Linear:
    """Assign the critic; returns its value head.

    The head is that of the critic's own folder, or the reward model's, or a new one of zeros.
    """
    config = builder.config
    if config.critic == "shared":
        model, adapter, _ = builder.assigned["actor"]
        builder.assign("critic", model, adapter, "head on the actor")
        return new_head(builder, model)
    if config.critic == "model":
        return place_critic_model(builder)
    # The critic's adapter is on weights that do not train: with freeze and full the reference's.
    model, _, words = builder.assigned["actor" if config.finetuning_type == "lora" else "reference"]
    head = new_head(builder, model)
    rewards = config.reward_adapters
    if config.finetuning_type != "lora":
        _, adapter, reference_words = builder.assigned["reference"]
        if adapter is None:
            model = create_peft_model(config, model, "critic", extras=False)
        else:
            add_adapter(config, model, "critic")
        builder.assign("reference", model, adapter, reference_words)
        builder.assign("critic", model, "critic", "the reference + LoRA 'critic' + head")
        return head
    if rewards:
        role, folder = next(iter(rewards.items()))
        settings = {"is_trainable": True, "torch_device": str(builder.device)}
        load_adapter(model, folder, "critic", "reward_model", **settings)
        if config.value_head_init == "reward":
            head.load_state_dict(builder.reward_heads[role].state_dict())
    else:
        add_adapter(config, model, "critic")
    base_words = words.split(" + LoRA")[0]
    builder.assign("critic", model, "critic", f"{base_words} + LoRA 'critic' + head")
    return head


def new_head(builder: RolesBuilder, model: nn.Module) -> nn.Linear:
    """The critic's head before others are looked for: given, saved with the policy, or zeros."""
    config, device = builder.config, builder.device
    given: nn.Linear | None = config.objects.value_head
    if given is not None:
        return given.float().to(device)
    if config.value_head_init == "model":
        folder = value_head_folder(config)
        return load_value_head(folder, hidden_size(model), device, "value_head_init")
    return new_value_head(hidden_size(model), device)


def place_critic_model(builder: RolesBuilder) -> nn.Linear:
    """`critic: model`: assign the critic to a separate model; returns its value head.

    The model is `critic_model`, with the head in its folder; without that key it is a second copy
    of the base with the first reward adapter merged into it. `critic_finetuning_type` says which of
    its weights train.
    """
    config, name = builder.config, builder.config.critic_model
    if name is None and config.objects.model is not None:
        raise UserError(
            f"{config.source}: critic: model needs a model of its own where the policy is an "
            "object; give value_model"
        )
    kind = config.critic_finetuning_type or config.finetuning_type
    bits = config.quantization_bit if kind == "lora" else None
    key = name and "critic_model"
    below = None if name is None else base_of(Path(name))  # of an adapter with a value head
    model: nn.Module = base_model(
        config, builder.device, below or name, bits, key=key, on_host=config.shards
    )
    if below is not None and name is not None:
        model = merge_adapters(model, [name], "critic_model")
    head = new_head(builder, model)
    words = name or "a second copy of the base"
    if name is not None:
        check_same_tokens(config, "critic_model", below or name, model)
        if config.objects.value_head is None and has_value_head(Path(name)):
            head = load_value_head(Path(name), hidden_size(model), builder.device, "critic_model")
    else:
        model = merge_adapters(model, adapters_to_merge(config), "adapter_name_or_path")
        for role, folder in list(config.reward_adapters.items())[:1]:
            model = merge_adapters(model, [folder], "reward_model")
            words += f" + {folder}"
            if config.value_head_init == "reward":
                head.load_state_dict(builder.reward_heads[role].state_dict())
    if kind == "lora":
        model = create_peft_model(config, model, "critic", extras=False)
        builder.assign("critic", model, "critic", f"{words} + LoRA 'critic' + head")
    else:
        builder.trainable_weights["critic"] = setup_weight_tuning(config, model, kind)
        some = "" if kind == "full" else ", some layers"
        builder.assign("critic", model, None, f"{words}{some} + head")
    return head
