"""Hidden states of a rollout's tokens, kept between its passes; by token, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


class SharedStates:
    """The hidden states of a rollout's tokens behind the shared layers: (N, D), no padding.

    They have the dtype of the residual stream.

    Args:
        lengths: the tokens of each sequence.
        on_host: keep them in host memory, not on the device.
    """

    def __init__(self, lengths: Sequence[int], *, on_host: bool = False) -> None:
        self.offsets = [0, *accumulate(lengths)]
        self.known = [False] * len(lengths)  # the sequences whose states are kept
        self.on_host = on_host
        self.state_ND: Tensor | None = None

    def among(self, rows: int, first: int) -> SharedStates:
        """These states as those of sequences `first` and following of `rows`; of others none."""
        own, rest = len(self.known), rows - first - len(self.known)
        found = SharedStates([], on_host=self.on_host)
        found.offsets = [0] * first + self.offsets + self.offsets[-1:] * rest
        found.known = [False] * first + self.known + [False] * (rows - first - own)
        found.state_ND = self.state_ND
        return found

    def part(
        self, rows: Sequence[int], lengths: Sequence[int], starts: Sequence[int], size: int
    ) -> StatesOfBatch:
        """The states of a micro-batch of `rows`, see `StatesOfBatch`."""
        stops = [*starts[1:], size]
        return StatesOfBatch(self, list(rows), list(lengths), list(starts), stops)


@dataclass(frozen=True)
class StatesOfBatch:
    """Where the states of a micro-batch are, among the rollout's and among its own B * T tokens.

    A sequence may be longer than that of the rollout, by the suffix that a reward model reads. The
    suffix has no kept states, so that its pass cannot start from them.

    Attributes:
        states: the rollout's.
        rows: the rollout's sequences in the micro-batch.
        lengths: tokens of each of them here.
        starts, stops: the first of its B * T tokens, and where the next sequence begins.
    """

    states: SharedStates
    rows: list[int]
    lengths: list[int]
    starts: list[int]
    stops: list[int]

    @property
    def complete(self) -> bool:
        """Whether the states of all tokens are kept."""
        offsets = self.states.offsets
        return all(
            self.states.known[row] and n == offsets[row + 1] - offsets[row]
            for row, n in zip(self.rows, self.lengths, strict=True)
        )

    def read(self, shape: torch.Size, device: torch.device) -> Tensor:
        """The kept states (B, T, D) on `device`, for B and T in `shape`.

        Padding gets the state of its sequence's last token: nothing attends to it, and a model can
        compute with it.
        """
        assert self.states.state_ND is not None
        index = torch.cat(
            [
                self.states.offsets[row] + torch.arange(stop - start).clamp_(max=n - 1)
                for row, n, start, stop in zip(
                    self.rows, self.lengths, self.starts, self.stops, strict=True
                )
            ]
        )
        state_ND = self.states.state_ND
        index = index.to(state_ND.device, non_blocking=True)
        return state_ND.index_select(0, index).to(device).view(*shape, -1)

    def keep(self, hidden_BTD: Tensor) -> None:
        """Keep the states of the rollout's tokens, which a pass has computed."""
        states, hidden_MD = self.states, hidden_BTD.detach().flatten(0, 1)
        if states.state_ND is None:
            device = torch.device("cpu") if states.on_host else hidden_MD.device
            shape = (states.offsets[-1], hidden_MD.shape[1])
            states.state_ND = torch.empty(shape, dtype=hidden_MD.dtype, device=device)
        for row, start in zip(self.rows, self.starts, strict=True):
            first, stop = states.offsets[row], states.offsets[row + 1]
            states.state_ND[first:stop] = hidden_MD[start : start + stop - first]
            states.known[row] = True
