"""Which mode of activation offloading a model is trained in; `auto` is decided here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import nn

from fastppo.offload import ActivationOffload, Mode, find_layers

RESERVE = 1 << 30  # left alone by `auto`: the head's chunk, the allocator's gaps


def activation_bytes(
    mode: Mode,
    *,
    layers: int,
    tokens: int,
    hidden_size: int,
    intermediate_size: int,
    itemsize: int = 2,
    keep_last: int = 1,
    in_flight: int = 2,
) -> int:
    """Bytes on the device for the backward of a Llama-like trunk, at the fullest moment (estimate).

    A layer without checkpointing keeps about 4 tensors of the MLP's width and 10 of the hidden one
    (flash attention, norms in float32); a layer that is recomputed needs that once, and as much
    again for gradients.
    """
    held = tokens * hidden_size * itemsize
    layer = tokens * (4 * intermediate_size + 10 * hidden_size) * itemsize
    few = min(layers, keep_last + in_flight + 1)
    whole = {
        "none": layers * layer + layer,
        "checkpoint": layers * held + 2 * layer,
        # One layer in use, one on its way back, the last ones kept, and gradients.
        "offload": min(layers, keep_last + 2) * layer + layer,
        "checkpoint+offload": few * held + 2 * layer,
    }
    return whole[mode]


def choose(free: int, needs: dict[Mode, int]) -> Mode:
    """The first of `needs`, which are ordered from fast to lean, that fits; else the last."""
    for mode, need in needs.items():
        if need <= free:
            return mode
    return list(needs)[-1]


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.get_device_module(device).mem_get_info(device)[0])


def auto_mode(model: nn.Module, tokens: int, offload_dir: str | Path | None) -> Mode:
    """The fastest mode in which a micro-batch of so many tokens fits what is free now.

    Gradients and Adam's state of what trains are still to come, 12 bytes a parameter. `offload`
    alone is never chosen: it moves some 30 times as much as `checkpoint+offload`. Nor is host
    memory where the device is the host, unless it is a file.
    """
    parameter = next(model.parameters())
    config = cast(Any, model).config.get_text_config()
    modes: list[Mode] = ["none", "checkpoint", "checkpoint+offload"]
    if parameter.device.type == "cpu" and offload_dir is None:
        modes.pop()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    free = free_bytes(parameter.device) - 12 * trained - RESERVE
    shape = {
        "layers": len(find_layers(model)),
        "tokens": tokens,
        "hidden_size": config.hidden_size,
        "intermediate_size": getattr(config, "intermediate_size", 4 * config.hidden_size),
        "itemsize": parameter.element_size(),
    }
    return choose(free, {mode: activation_bytes(mode, **shape) for mode in modes})


def wrap(
    model: nn.Module, mode: str, *, tokens: int, offload_dir: str | Path | None = None
) -> ActivationOffload:
    """Enter `mode` for good, `auto` resolved for micro-batches of `tokens` tokens; once a model.

    It stays on the model as `activation_offload`. Call it where the model is in place, on its
    device, with all that trains: `auto` looks at what is free then.
    """
    known = getattr(model, "activation_offload", None)
    if known is None:
        chosen = auto_mode(model, tokens, offload_dir) if mode == "auto" else mode
        known = ActivationOffload(model, cast(Mode, chosen), offload_dir=offload_dir).__enter__()
        cast(Any, model).activation_offload = known
    return known
