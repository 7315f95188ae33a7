"""Rows of a rollout as one forward pass: ids, mask, and where the response tokens' states lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppo.ops import Packing, pack
from fastppo.types import Rollout


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Position t of the packing is the state from which token t + 1 was sampled."""

    rows: list[int]
    input_ids_BT: Tensor
    mask_BT: Tensor
    packing: Packing
    token_N: Tensor

    @property
    def last_B(self) -> Tensor:
        """Position of each row's last live token."""
        return self.mask_BT.sum(1) - 1


def make_batch(rollout: Rollout, rows: Sequence[int]) -> Batch:
    """The rows given, in ascending order, trimmed to the longest of them.

    Ascending, so that scoring and update, given the same rows, run the same GEMMs to the same bits.
    """
    rows = sorted(rows)
    device = rollout.input_ids_BT.device
    index = torch.tensor(rows, device=device)
    lengths = [rollout.lengths[row] for row in rows]
    width = max(lengths)
    position_T = torch.arange(width, device=device)
    length_B = torch.tensor(lengths, device=device)
    prompt_B = torch.tensor([rollout.prompt_lengths[row] for row in rows], device=device)
    input_ids_BT = rollout.input_ids_BT[index, :width]
    states_BT = (position_T >= prompt_B[:, None] - 1) & (position_T < length_B[:, None] - 1)
    packing = pack(states_BT)
    next_BT = torch.roll(input_ids_BT, shifts=-1, dims=1)
    return Batch(
        rows=rows,
        input_ids_BT=input_ids_BT,
        mask_BT=(position_T < length_B[:, None]).long(),
        packing=packing,
        token_N=packing.gather(next_BT),
    )


def batches(rollout: Rollout, rows: Sequence[int], size: int) -> Iterator[Batch]:
    """The rows in micro-batches of `size` sequences."""
    for start in range(0, len(rows), size):
        yield make_batch(rollout, rows[start : start + size])


def token_index(offsets: Tensor, rows: Sequence[int]) -> Tensor:
    """Where in the packed tokens of the whole rollout the tokens of `rows` are (int64)."""
    bounds = offsets.tolist()
    spans = [torch.arange(bounds[row], bounds[row + 1]) for row in rows]
    return torch.cat(spans).to(offsets.device)
