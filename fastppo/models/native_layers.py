"""RMS norms and gated MLPs of a float32 model on a CPU, by native kernels with a backward.

PyTorch reads and writes memory once for each of their small steps, which are a tenth of an update
between matrix products of a small model. Rollouts, scoring and updates all run these forwards, so
that they round alike.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastppo.ops.decoder_layer import Norm
from fastppo.ops.few_rows import runs_native
from fastppo.ops.gated_unit import gated_unit
from fastppo.ops.rms_norm import rms_norm

SILU: Final = ("SiLU", "SiLUActivation")
GATED: Final = {"gate_proj", "up_proj", "down_proj"}


class NativeNorm:
    """The norm by the native kernel, or in another dtype by the module's `own` forward.

    Some families have 1 + weight in place of weight: `from_one` says so.
    """

    def __init__(self, module: Any, *, from_one: bool) -> None:
        self.module, self.own, self.from_one = module, module.forward, from_one
        self.eps = eps_of(module)

    def __call__(self, x: Tensor) -> Tensor:
        if is_native(x) and is_native(self.module.weight):
            return rms_norm(x, self.scale_D, self.eps)
        result: Tensor = self.own(x)
        return result

    @property
    def scale_D(self) -> Tensor:
        """What the norm multiplies x / sqrt(mean(x^2) + eps) by."""
        weight_D: Tensor = self.module.weight
        return 1.0 + weight_D if self.from_one else weight_D

    @property
    def norm(self) -> Norm:
        """The norm as the kernels take it, for as long as its weight stays as it is."""
        return Norm(self.scale_D.detach(), self.eps)


class NativeMLP:
    """down(silu(gate(x)) * up(x)) with the native unit, or in another dtype the `own` forward."""

    def __init__(self, module: Any) -> None:
        self.module, self.own = module, module.forward

    def __call__(self, x: Tensor) -> Tensor:
        if not is_native(x) or torch.is_autocast_enabled("cpu"):
            other: Tensor = self.own(x)
            return other
        module = self.module
        gate, up = module.gate_proj(x), module.up_proj(x)
        alike = is_native(gate) and is_native(up)
        unit = gated_unit(gate, up) if alike else module.act_fn(gate) * up
        del gate, up  # freed before the next product, as in transformers' one expression
        result: Tensor = module.down_proj(unit)
        return result


def is_native(x: Tensor) -> bool:
    """Whether the native kernels can run on this tensor."""
    return x.dtype is torch.float32 and x.device.type == "cpu"


def eps_of(module: Any) -> float:
    """The eps of an RMS norm, whatever its family calls it."""
    names = ("variance_epsilon", "eps", "epsilon")
    return next((float(getattr(module, name)) for name in names if hasattr(module, name)), 0.0)


def takes_one(module: nn.Module) -> bool:
    """Whether the forward of the module's class takes one tensor, and nothing else."""
    return len(signature(type(module).forward).parameters) == 2


def native_norm(module: Any) -> NativeNorm | None:
    """The native forward of an RMS norm; None if `module` is none that the kernel computes.

    Some families multiply by 1 + weight in place of weight: the module is run once, to see.
    """
    weight = getattr(module, "weight", None)
    if not (type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter)):
        return None
    if not takes_one(module):
        return None
    if weight.dtype is not torch.float32 or weight.dim() != 1 or not runs_native(weight):
        return None
    x = torch.linspace(-1, 2, 2 * len(weight)).view(2, 1, -1)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        wanted = module.forward(x)  # without hooks, which run around the new forward too
        for from_one in (False, True):
            found = NativeNorm(module, from_one=from_one)
            if torch.allclose(found(x).to(wanted.dtype), wanted, atol=1e-6, rtol=1e-5):
                return found if wanted.dtype is torch.float32 else None
    return None


def native_mlp(module: Any) -> NativeMLP | None:
    """The native forward of a gated MLP; None if `module` is none, or computes something more.

    Its class is run once on projections of a few numbers, to see.
    """
    parts = dict(module.named_children())
    weights = any(True for _ in module.parameters(recurse=False))
    if weights or not GATED <= set(parts) <= {*GATED, "act_fn"}:
        return None
    if type(getattr(module, "act_fn", None)).__name__ not in SILU or not takes_one(module):
        return None
    if not runs_native(torch.empty(1, 1, device=next(module.parameters()).device)):
        return None
    few = {"gate_proj": (2, 3), "up_proj": (2, 3), "down_proj": (3, 2)}
    probe = object.__new__(type(module))
    probe.__dict__ = {**vars(module), "_modules": dict(parts)}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for name, (wide, out) in few.items():
            probe._modules[name] = nn.Linear(wide, out, bias=False)
        x = torch.tensor([[[-1.0, 2.0], [0.5, -3.0]]])
        wanted, found = type(module).forward(probe, x), NativeMLP(probe)(x)
    alike = isinstance(wanted, Tensor) and torch.allclose(found, wanted, atol=1e-6, rtol=1e-5)
    return NativeMLP(module) if alike else None


def fuse_native_layers(model: nn.Module) -> None:
    """Give norms and gated MLPs of `model` their native forwards.

    Without native kernels (on a GPU, with FASTPPO_BACKEND=torch) nothing changes.
    """
    for module in model.modules():
        if "forward" not in vars(module):
            forward = native_norm(module) or native_mlp(module)
            if forward is not None:
                module.forward = forward
