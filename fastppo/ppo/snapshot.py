"""Undoing a step that a signal interrupts: parameters and optimiser state are copied to the host
before the update, and restored if it does not end."""

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

    With AdamW three float32 for each trainable parameter; for LoRA adapters that is little. The
    loss scaler's state is copied too, where there is one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: GradScaler | None = None) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.scale: dict[str, Any] = {}
        self.copies: dict[tuple[int, str], Tensor] = {}
        self.others: dict[tuple[int, str], Any] = {}  # counts of steps that are no tensors
        self.taken = False

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the optimiser's order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def items(self) -> Iterator[tuple[tuple[int, str], Any]]:
        """Each parameter ("") and each entry of its state, by place and name."""
        for place, parameter in enumerate(self.parameters()):
            yield (place, ""), parameter.detach()
            for name, value in self.optimizer.state.get(parameter, {}).items():
                yield (place, name), value

    def nbytes(self) -> int:
        """Size of a copy."""
        return sum(value.nbytes for _, value in self.items() if isinstance(value, Tensor))

    def fits(self) -> bool:
        """Whether the host has room for a copy, or has its buffers already."""
        return bool(self.copies) or self.nbytes() <= SHARE * psutil.virtual_memory().available

    @torch.no_grad()
    def take(self) -> bool:
        """Copy parameters and state as they are now; False if that is too large."""
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
        """Restore what was copied; optimiser state that is newer than the copy is deleted."""
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
    """A block that a signal ends at once, because a copy of what it changes has been made.

    Without a copy (nobody listens for signals, or it is too large) a signal waits for its end.
    """
    if state.stop.listens and state.snapshot.take():
        return state.stop.at_once()
    state.stop.check()  # a signal may have come just before, and it ended the listening
    return nullcontext()
