"""Models that a program gives as objects, made ready as `load_base` makes those that it loads."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from fastppo.config.published import check_last_position
from fastppo.errors import UserError
from fastppo.models.load import (
    attention_implementation,
    causal_lm,
    compute_dtype,
    disable_dropout,
    load_base,
)
from fastppo.models.quantised import use_training_kernels

if TYPE_CHECKING:
    from fastppo.config import Config


def base_model(
    config: Config,
    device: torch.device,
    name: str | None = None,
    bits: int | None = None,
    *,
    key: str | None = None,
    on_host: bool = False,
) -> Any:
    """The model that was given in place of `key`, made ready; or the one that `load_base` loads.

    Of a PeftModel it is the model inside. A given model is changed in place: it is what trains.
    """
    given = config.objects.under(key)
    if given is None:
        return load_base(config, device, name, bits, key=key, on_host=on_host)
    return prepare(config, device, given, key or "model_name_or_path", on_host=on_host)


def prepare(
    config: Config, device: torch.device, given: nn.Module, key: str, *, on_host: bool
) -> nn.Module:
    """Freeze a given model, turn its dropout off, and bring it into the run's dtype and place.

    Only parameters are cast: buffers such as the frequencies of rotary positions are float32 in
    models of any dtype.
    """
    base: Any = causal_lm(given)
    name = getattr(config, key)
    check_last_position(config, key, name, base.config.to_dict())
    if key != "critic_model" and getattr(base.get_output_embeddings(), "weight", None) is None:
        raise UserError(
            f"{config.source}: {key}: {type(base).__name__} has no output head for tokens; give a "
            "causal language model"
        )
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # in 5.23, and before
    if next((getattr(base, name) for name in names if hasattr(type(base), name)), False):
        base.gradient_checkpointing_disable()  # `activation_offloading` is in charge of that
    dtype = compute_dtype(config, device)
    if config.flash_attn != "auto":
        kind = attention_implementation(config.flash_attn, device, dtype)
        base.set_attn_implementation(kind)
    given.requires_grad_(False)
    disable_dropout(given)
    if getattr(base, "is_quantized", False):
        use_training_kernels(base)
        return base
    for parameter in base.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    base.config.dtype = dtype
    return base if on_host else base.to(device)


def given_adapters(config: Config) -> PeftModel | None:
    """The PeftModel that was given in place of model_name_or_path, or None."""
    model = config.objects.model
    return model if isinstance(model, PeftModel) else None


def is_new(model: PeftModel, adapter: str) -> bool:
    """Whether an adapter changes no output yet: its B matrices are 0, and it is nothing else."""
    saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    kinds = [name.rpartition(".lora_")[2][:1] for name in saved if ".lora_" in name]
    whole = [name for name in saved if ".lora_" not in name]
    magnitudes = [name for name in saved if "lora_magnitude" in name]
    zero = all(not x.any() for name, x in saved.items() if ".lora_B" in name)
    return bool(kinds) and not whole and not magnitudes and zero


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Add the adapter `target` to the model, with the weights that `source` has now."""
    weights = get_peft_model_state_dict(model, adapter_name=source, save_embedding_layers=False)
    model.add_adapter(target, copy.deepcopy(model.peft_config[source]))
    set_peft_model_state_dict(model, weights, adapter_name=target)
