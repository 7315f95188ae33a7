"""Undo a step that a signal interrupts: parameters and optimiser state are copied to the host
before the update, and restored if the update is interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fastppo.errors import Interrupted

if TYPE_CHECKING:
    from fastppo.ppo.state import State

SHARE = 0.25  # a copy larger than this share of the host's free memory is not made


class Snapshot:
    """A host copy of an optimiser's parameters and state, in buffers that every step reuses.

    With AdamW it has three float32 numbers for each trainable parameter. The state of the loss
    scaler, if there is one, is copied too.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: GradScaler | None = None) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.scale: dict[str, Any] = {}
        self.copies: dict[tuple[int, str], Tensor] = {}
        self.others: dict[tuple[int, str], Any] = {}  # state that is not a tensor (step counts)
        self.taken = False

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the optimiser's order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def items(self) -> Iterator[tuple[tuple[int, str], Any]]:
        """Each parameter and each entry of its state: ((index, name), value).

        The name is "" for the parameter itself.
        """
        for place, parameter in enumerate(self.parameters()):
            yield (place, ""), parameter.detach()
            for name, value in self.optimizer.state.get(parameter, {}).items():
                yield (place, name), value

    def nbytes(self) -> int:
        """Size of a copy, in bytes."""
        return sum(value.nbytes for _, value in self.items() if isinstance(value, Tensor))

    def fits(self) -> bool:
        """Whether the host has memory for a copy, or the buffers exist already."""
        return bool(self.copies) or self.nbytes() <= SHARE * psutil.virtual_memory().available

    @torch.no_grad()
    def copy(self) -> bool:
        """Copy the present parameters and state; returns False if the copy would be too large."""
        self.taken = False
        if not self.fits():
            return False
        if self.scaler is not None:
            self.scale = self.scaler.state_dict()
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
        """Restore the copied values; optimiser state that was created later is deleted."""
        if self.scaler is not None:
            self.scaler.load_state_dict(self.scale)
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


@contextmanager
def undo_if_interrupted(state: State) -> Iterator[None]:
    """If a signal ends the block, restore everything that the step has changed."""
    running, decisions = replace(state.running_score), state.budgets.decisions()
    state.snapshot.taken = False
    try:
        yield
    except Interrupted:
        if state.snapshot.taken:
            state.snapshot.restore()
        state.running_score = running
        state.budgets.adopt(decisions)
        raise


def interruptible_update(state: State) -> AbstractContextManager[None]:
    """Context in which a signal ends the update at once, after copying everything it changes.

    If no copy is made (signals are not handled, or it is too large), the update runs to its end.
    """
    if state.stop.listens and state.snapshot.copy():
        return state.stop.at_once()
    state.stop.check()  # a signal may have come just before; its handler has removed itself
    return nullcontext()
