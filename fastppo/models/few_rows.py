"""For the length of a rollout on a CPU, linear layers whose weights are read once a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from torch import Tensor, nn

from fastppo.ops.few_rows import few_rows_linear, runs_native, suits


def forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """In place of the layer's own, which prompts still take."""
    if suits(x, layer.weight):
        return few_rows_linear(x, layer.weight, layer.bias)
    return nn.functional.linear(x, layer.weight, layer.bias)


@contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """Inside the block every plain linear layer of `model` has this forward; after it its own.

    Where there are no kernels for it (a GPU, FASTPPO_BACKEND=torch) nothing changes.
    """
    changed = []
    try:
        for module in model.modules():
            # One whose forward is somebody's already (a hook that brings its weight) keeps it.
            if type(module) is nn.Linear and "forward" not in vars(module):
                if not runs_native(module.weight):
                    continue
                module.forward = MethodType(forward, module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward
