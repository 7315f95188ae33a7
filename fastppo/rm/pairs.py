"""Encoded pairs as a data set, and their collation into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastppo.types import Pair


class Pairs(Dataset[Pair]):
    """Pairs as a map-style data set."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its longer answer."""
        return max(
            (
                len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
                for pair in self.pairs
            ),
            default=0,
        )

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]


def part_of(inputs: dict[str, Tensor], part: range) -> dict[str, Tensor]:
    """The pairs `part` (not empty) of a micro-batch, padded to the longest of them."""
    count = len(inputs["input_ids"]) // 2
    if len(part) == count:
        return inputs
    rows = [*part, *(count + pair for pair in part)]
    width = int(inputs["attention_mask"][rows].sum(1).max())
    return {name: x[rows, :width] for name, x in inputs.items()}


def collate(pairs: list[Pair], pad_id: int) -> dict[str, Tensor]:
    """A micro-batch: all chosen answers, then all rejected ones, padded right to the longest."""
    rows = [pair.prompt_ids + pair.chosen_ids for pair in pairs]
    rows += [pair.prompt_ids + pair.rejected_ids for pair in pairs]
    return pad(rows, pad_id)


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Ids and mask of `rows`, padded right to the longest."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
