"""Faster layers for sampling on CPUs; they are put in for a rollout and taken out after it.

A step of decoding runs hundreds of small layers on a few rows. A linear layer reads its weight
once; a layer with a merged adapter is its base; an RMS norm is one pass in place of six.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fastppo.ops.few_rows import FewRows, runs_native
from fastppo.ops.rms_norm import rms_norm


def few_rows_forward(few_rows: FewRows, x: Tensor) -> Tensor:
    """y = x W^T + b: by the native kernel if x has few rows, as in decoding, else by PyTorch."""
    if few_rows.suits(x):
        return few_rows(x)
    return nn.functional.linear(x, few_rows.weight, few_rows.bias)


def rms_norm_forward(own: Any, weight_D: Tensor, eps: float, x: Tensor) -> Tensor:
    """The norm by the native kernel, or by the module's `own` forward in another dtype."""
    if x.dtype is torch.float32 and not torch.is_grad_enabled():
        return rms_norm(x, weight_D, eps)
    result: Tensor = own(x)
    return result


def rms_scale(module: Any) -> Tensor | None:
    """What `module` multiplies x / sqrt(mean(x^2) + eps) by; None if it is no such norm.

    Some families have 1 + weight in place of weight: the module is run once, to see.
    """
    weight = getattr(module, "weight", None)
    if not (type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter)):
        return None
    if weight.dtype is not torch.float32 or weight.dim() != 1 or not runs_native(weight):
        return None
    x = torch.linspace(-1, 2, 2 * len(weight)).view(2, 1, -1)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        wanted = module.forward(x)  # without hooks, which run around the new forward too
        for scale in (weight.data, 1.0 + weight.data):
            found = rms_norm(x, scale, eps_of(module)).to(wanted.dtype)
            if torch.allclose(found, wanted, atol=1e-6, rtol=1e-5):
                return scale if wanted.dtype is torch.float32 else None
    return None


def eps_of(module: Any) -> float:
    """The eps of an RMS norm, whatever its family calls it."""
    names = ("variance_epsilon", "eps", "epsilon")
    return next((float(getattr(module, name)) for name in names if hasattr(module, name)), 0.0)


def without_adapter(layer: Any) -> nn.Linear | None:
    """The base of a LoRA layer if that is all it computes: merged, or adapters off."""
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else None
    if not isinstance(base, nn.Linear) or type(base) is not nn.Linear:
        return None
    return base if layer.merged != layer.disable_adapters else None


def fast_forward(module: Any) -> Any:
    """The forward that replaces the module's own during a rollout; None if none does."""
    # A streamed layer has a forward of its own, which copies its weight: leave it.
    base = without_adapter(module)
    if base is None and type(module) is nn.Linear:
        base = module
    if base is not None:
        if "forward" in vars(base) or not runs_native(base.weight):
            return None
        return partial(few_rows_forward, FewRows(base.weight, base.bias))
    if "forward" not in vars(module) and (scale_D := rms_scale(module)) is not None:
        return partial(rms_norm_forward, module.forward, scale_D, eps_of(module))
    return None


@contextmanager
def use_cpu_layers(model: nn.Module) -> Iterator[None]:
    """Inside the block the layers of `model` run as this module has them.

    Without native kernels (on a GPU, with FASTPPO_BACKEND=torch) nothing changes.
    """
    found = [(module, fast_forward(module)) for module in model.modules()]
    changed: list[tuple[Any, Any]] = []
    try:
        module: Any
        for module, forward in found:
            if forward is not None:
                changed.append((module, vars(module).get("forward")))
                module.forward = forward
        yield
    finally:
        for module, before in changed:
            if before is None:
                del module.forward
            else:
                module.forward = before
