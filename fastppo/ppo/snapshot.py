"""What an update changes, copied to the host before it: where a signal cuts it off, the step is
dropped, and parameters and optimiser are what the last step left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import Tensor, nn

SHARE = 0.25  # of the host's free memory, that a copy may take; a larger one is not made


class Snapshot:
    """A host copy of an optimiser's parameters and state, in buffers that are used again.

    Three float32 for each trained parameter under AdamW: for LoRA adapters a small part of what a
    step computes with.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.copies: dict[tuple[int, str], Tensor] = {}
        self.others: dict[tuple[int, str], Any] = {}  # steps that are counted on the host
        self.taken = False

    def parameters(self) -> list[nn.Parameter]:
        """All that trains, in the optimiser's order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def items(self) -> Iterator[tuple[tuple[int, str], Any]]:
        """Each parameter ("") and each entry of its state, by place and name."""
        for place, parameter in enumerate(self.parameters()):
            yield (place, ""), parameter.detach()
            for name, value in self.optimizer.state.get(parameter, {}).items():
                yield (place, name), value

    def nbytes(self) -> int:
        """Bytes of a copy."""
        return sum(value.nbytes for _, value in self.items() if isinstance(value, Tensor))

    def fits(self) -> bool:
        """Whether the host has room; buffers that are there already have it."""
        return bool(self.copies) or self.nbytes() <= SHARE * psutil.virtual_memory().available

    @torch.no_grad()
    def take(self) -> bool:
        """Copy what is there now; False where that is too large to be kept."""
        self.taken = False
        if not self.fits():
            return False
        found = dict(self.items())
        self.others = {key: x for key, x in found.items() if not isinstance(x, Tensor)}
        tensors = {key: x for key, x in found.items() if isinstance(x, Tensor)}
        self.copies = {key: self.copies[key] for key in tensors if key in self.copies}
        for key, tensor in tensors.items():
            if key in self.copies:
                self.copies[key].copy_(tensor)
            else:
                self.copies[key] = tensor.detach().to("cpu", copy=True)
        self.taken = True
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was copied; state that a parameter did not have then is taken away."""
        for place, parameter in enumerate(self.parameters()):
            parameter.copy_(self.copies[place, ""])
            state = self.optimizer.state.get(parameter, {})
            for name in list(state):
                if (place, name) in self.copies:
                    state[name].copy_(self.copies[place, name])
                elif (place, name) in self.others:
                    state[name] = self.others[place, name]
                else:
                    del state[name]
            if not state:
                self.optimizer.state.pop(parameter, None)
