"""Metrics of a loss: sums over its live tokens, kept as the one vector that its kernels write.

A loss is called for every micro-batch, and most of its metrics are read once in many, if at all: a
tensor for each of them would cost the host as much as everything else that a call does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

M = TypeVar("M", bound="Metrics")


class Entry:
    """A field of Metrics, as a 0-d view of the vector; its place is that of its declaration."""

    def __set_name__(self, owner: type[Metrics], name: str) -> None:
        self.index = len(owner._fields)
        owner._fields = (*owner._fields, name)

    @overload
    def __get__(self, metrics: None, owner: type[Metrics]) -> Entry: ...

    @overload
    def __get__(self, metrics: Metrics, owner: type[Metrics]) -> Tensor: ...

    def __get__(self, metrics: Metrics | None, owner: type[Metrics]) -> Entry | Tensor:
        return self if metrics is None else metrics.vector[self.index]


@dataclass(eq=False)
class Metrics:
    """The fields' values in `vector`; iterating gives them in their order, as 0-d tensors."""

    vector: Tensor
    _fields: ClassVar[tuple[str, ...]] = ()
    _maxima: ClassVar[tuple[str, ...]] = ()  # fields that are no sums

    def __init_subclass__(cls) -> None:
        pytree.register_pytree_node(cls, _flatten, lambda values, _: cls(*values))

    @classmethod
    def of(cls: type[M], entries: Sequence[Tensor]) -> M:
        """The metrics with these values of the fields."""
        return cls(torch.stack(tuple(entries)))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.vector.unbind(0))

    def __len__(self) -> int:
        return len(self._fields)

    def merge(self: M, other: M) -> M:
        """Metrics of two batches together."""
        added = self.vector + other.vector
        for name in self._maxima:
            at = self._fields.index(name)
            added[at] = torch.maximum(self.vector[at], other.vector[at])
        return type(self)(added)


def _flatten(metrics: Metrics) -> tuple[list[Any], None]:
    return [metrics.vector], None
