"""Slots: a KV cache that is allocated once for a rollout, and that rows enter and leave.

The last token of every row is at the same index of the cache, `end`, as in a batch that is padded
on the left: so a model makes its masks, windows and position biases as it does for such a batch. A
prompt that enters is copied to the places before `end`. Where `end` reaches the cache's width, all
rows are moved back together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


@dataclass
class Extent:
    """Which part of the cache the rows are in; shared by all layers.

    Attributes:
        end: index of the next token's keys and values.
        longest: number of tokens before `end` in the longest row.
        rows: number of rows; they are in the first slots.
        first: by sliding window (None: none), the first of the longest row's places that each row
            attends to; empty outside `slot_attention`.
        attended: how many layers have run `slot_attention` in this step.
    """

    end: int
    longest: int = 0
    rows: int = 0
    first: dict[int | None, Tensor] = field(default_factory=dict)
    attended: int = 0

    @property
    def start(self) -> int:
        """Index of the first token of the longest row."""
        return self.end - self.longest


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, (slots, heads, width, head size)."""

    is_sliding = False  # the whole row is kept, so masks are made for all of it
    keys: Tensor
    values: Tensor

    def __init__(self, slots: int, width: int, extent: Extent, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots, self.width, self.extent, self.window = slots, width, extent, window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate keys and values, of the heads and dtypes of these."""
        for name, x in (("keys", key_states), ("values", value_states)):
            shape = (self.slots, x.shape[1], self.width, x.shape[3])
            # Zeros, because what is masked is still multiplied, and 0 times NaN is NaN.
            setattr(self, name, torch.zeros(shape, dtype=x.dtype, device=x.device))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the next token of each row; returns views of the rows up to that token."""
        extent = self.extent
        at = slice(extent.end, extent.end + 1)
        self.keys[: extent.rows, :, at] = key_states
        self.values[: extent.rows, :, at] = value_states
        here = slice(extent.start, extent.end + 1)
        keys: Any = self.keys[: extent.rows, :, here]
        keys.slot_layer = self  # for slot_attention, which is given these keys
        return keys, self.values[: extent.rows, :, here]

    def write(self, slots: list[int], row: int, length: int, source: Any) -> None:
        """Copy the last `length` tokens of `row` in a layer of a DynamicCache to slots."""
        if not self.is_initialized:
            self.lazy_initialization(source.keys, source.values)
        at = slice(self.extent.end - length, self.extent.end)
        for slot in slots:
            self.keys[slot, :, at] = source.keys[row, :, -length:]
            self.values[slot, :, at] = source.values[row, :, -length:]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row of `length` tokens to another slot."""
        at = slice(self.extent.end - length, self.extent.end)
        self.keys[target, :, at] = self.keys[source, :, at]
        self.values[target, :, at] = self.values[source, :, at]

    def shift(self, end: int) -> None:
        """Move all rows, so that their next token is at `end`, which is further back."""
        extent = self.extent
        here, there = (slice(at - extent.longest, at) for at in (extent.end, end))
        for x in (self.keys, self.values):
            x[: extent.rows, :, there] = x[: extent.rows, :, here].clone()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of places that `update` will return, and the index of the first."""
        return self.extent.longest + query_length, 0

    def get_seq_length(self) -> int:
        """Number of tokens before the next one, in the longest row."""
        return self.extent.longest

    def get_max_length(self) -> int:
        """The most tokens that a row can have."""
        return self.width


class SlotCache(Cache):
    """The slots of all layers.

    Args:
        windows: the sliding window of each layer, or None.
        slots: number of rows.
        width: number of places of a row.
        end: where the first token after a prompt goes; no prompt may be longer.
    """

    def __init__(self, windows: Sequence[int | None], slots: int, width: int, end: int) -> None:
        self.extent = Extent(end)
        self.width, self.least_end = width, end
        self.slot_layers = [SlotLayer(slots, width, self.extent, window) for window in windows]
        super().__init__(layers=list(self.slot_layers))

    def admit(self, source: DynamicCache, row: int, length: int, slots: list[int]) -> None:
        """Copy a prompt of `length` tokens, which is `row` of `source`, to slots."""
        for own, layer in zip(self.slot_layers, source.layers, strict=True):
            own.write(slots, row, length, layer)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row of `length` tokens to another slot."""
        for layer in self.slot_layers:
            layer.move(source, target, length)

    def prepare(self, lengths: list[int]) -> None:
        """Make room for one more token of rows that have these numbers of tokens."""
        self.extent.rows, self.extent.longest = len(lengths), max(lengths)
        if self.extent.end < self.width:
            return
        end = max(self.least_end, self.extent.longest)
        for layer in self.slot_layers:
            layer.shift(end)
        self.extent.end = end

    def restart(self) -> None:
        """Begin anew, with no row."""
        self.extent.end, self.extent.longest, self.extent.rows = self.least_end, 0, 0


def windows_of(cache: Any) -> list[int | None] | None:
    """The sliding window of each layer of a model's own cache; None if it cannot be slots.

    That is so if the cache holds more than the keys and values of all tokens: states of linear
    attention or convolutions, compressed keys, an encoder's keys, layers without a cache.
    """
    if type(cache) is not DynamicCache:
        return None
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    return [getattr(layer, "sliding_window", None) for layer in cache.layers]
