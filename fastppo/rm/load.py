"""What a run of stage rm trains or evaluates: the base, its adapter and its head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastppo.models.adapters import (
    adapter_to_continue,
    adapters_to_merge,
    disable_input_cast,
    load_peft_model,
    merge_adapters,
    setup_lora_tuning,
)
from fastppo.models.load import hidden_size, load_base
from fastppo.models.lora import fuse_lora_layers
from fastppo.models.native_layers import fuse_native_layers
from fastppo.models.value_head import has_value_head, load_value_head, new_value_head
from fastppo.models.weight_tuning import (
    round_outputs,
    setup_weight_tuning,
    upcast_trainable,
)

if TYPE_CHECKING:
    from fastppo.config import Config

HEAD_STD = 0.01  # standard deviation of a new head's weights: all scores start near 0


def load_trainable_model(config: Config, device: torch.device) -> nn.Module:
    """The base model, with the parameters that `finetuning_type` trains in float32."""
    base = load_base(config, device, bits=config.quantization_bit)
    if config.finetuning_type == "lora":
        model: nn.Module = setup_lora_tuning(config, base)
        trained = [p for p in model.parameters() if p.requires_grad]
        round_outputs(model, trained)
        disable_input_cast(model)
        fuse_lora_layers(model)
    else:
        model, trained = base, setup_weight_tuning(config, base, config.finetuning_type)
    upcast_trainable(trained)
    fuse_native_layers(model)
    return model


def folder_of_head(config: Config) -> Path | None:
    """Folder with the reward head that training continues, as in LLaMA-Factory; or None.

    It is that of the adapter that training continues, or without adapters that of the model. An SFT
    adapter or a language model has no head: then a new head is made.
    """
    continued = adapter_to_continue(config)
    if continued is None and config.adapter_name_or_path is None:
        continued = config.model_name_or_path
    return Path(continued) if continued is not None and has_value_head(Path(continued)) else None


def load_finished(config: Config, folder: Path, device: torch.device) -> nn.Module:
    """Load what fastppo or LLaMA-Factory saved in `folder`: a base's adapter, or a whole model."""
    if config.finetuning_type == "lora":
        base = load_base(config, device, bits=config.quantization_bit)
        merged = merge_adapters(base, adapters_to_merge(config), "adapter_name_or_path")
        model = load_peft_model(merged, str(folder), "adapter_name_or_path", train=False)
    else:
        model = load_base(config, device, str(folder))
    fuse_native_layers(model)
    return model


def head_notes(config: Config, start: Path | None, evaluated: Path | None) -> list[str]:
    """A line where training goes on with the head of the base, which is not named as one."""
    if start is None or evaluated is not None or str(start) != config.model_name_or_path:
        return []
    return [f"{start} has a value head, and training goes on with it"]


def load_head(
    config: Config, start: Path | None, model: nn.Module, device: torch.device
) -> nn.Linear:
    """The head in `start`, or a new one."""
    size = hidden_size(model)
    if start is None:
        head = new_value_head(size, device)
        nn.init.normal_(head.weight, std=HEAD_STD)
        return head
    key = "adapter_name_or_path" if config.adapter_name_or_path else "model_name_or_path"
    return load_value_head(start, size, device, key)
