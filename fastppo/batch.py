"""Rows of a rollout as one forward pass: ids, mask, and where the response tokens' states lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from fastppo.ops import Packing, pack
from fastppo.types import Sequences

Sent = TypeVar("Sent", Tensor, Packing)


def to_device(x: Sent, device: torch.device) -> Sent:
    """On `device`, without the host waiting for what is still queued there."""
    if isinstance(x, Packing):
        index_N, offsets = to_device(x.index_N, device), to_device(x.offsets, device)
        return Packing(index_N, offsets, x.shape)
    return x.to(device, non_blocking=True)


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


def make_batch(sequences: Sequences, rows: Sequence[int]) -> Batch:
    """The rows given, in ascending order, trimmed to the longest of them.

    Ascending, so that scoring and update, given the same rows, run the same GEMMs to the same bits.
    """
    rows = sorted(rows)
    device = sequences.input_ids_BT.device
    lengths = [sequences.prompt_lengths[row] + sequences.response_lengths[row] for row in rows]
    length_B = torch.tensor(lengths)
    prompt_B = torch.tensor([sequences.prompt_lengths[row] for row in rows])
    width = max(lengths)
    position_T = torch.arange(width)
    # Made on the host, where the lengths are known, and sent without waiting for the device.
    states_BT = (position_T >= prompt_B[:, None] - 1) & (position_T < length_B[:, None] - 1)
    packing = to_device(pack(states_BT), device)
    index = to_device(torch.tensor(rows), device)
    input_ids_BT = sequences.input_ids_BT[index, :width]
    next_BT = torch.roll(input_ids_BT, shifts=-1, dims=1)
    return Batch(
        rows=rows,
        input_ids_BT=input_ids_BT,
        mask_BT=to_device((position_T < length_B[:, None]).long(), device),
        packing=packing,
        token_N=packing.gather(next_BT),
    )


def batches(sequences: Sequences, rows: Sequence[int], size: int) -> Iterator[Batch]:
    """The rows in micro-batches of `size` sequences."""
    for start in range(0, len(rows), size):
        yield make_batch(sequences, rows[start : start + size])


def token_index(response_lengths: Sequence[int], rows: Sequence[int]) -> Tensor:
    """Where in the packed tokens of the whole rollout the tokens of `rows` are: int64, on the host.

    From lengths and not from offsets: those lie on the device, which would have to be waited for.
    """
    bounds = [0, *accumulate(response_lengths)]
    return torch.cat([torch.arange(bounds[row], bounds[row + 1]) for row in rows])


def endless(n: int, number: int, size: int, *, seed: int, shuffle: bool = True) -> list[int]:
    """Batch `number` of an endless stream over n things, shuffled anew in every pass over them.

    It depends on the seed and the number alone, so a step is the same whatever ran before it.
    """
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(number * size, (number + 1) * size):
        epoch, place = divmod(position, n)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed + epoch)
            shuffled = torch.randperm(n, generator=generator).tolist()
            orders[epoch] = shuffled if shuffle else list(range(n))
        chosen.append(orders[epoch][place])
    return chosen
