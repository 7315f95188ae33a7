"""Tensors put away in host memory and taken out again, the one needed next already on its way."""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastppo.offload.streams import Event, HostMemory, Ring, Streams, storage_bytes, streams_of


class Group:
    """What one layer put away; it comes back together, and the group before it on its heels."""

    def __init__(self) -> None:
        self.records: list[weakref.ref[Record]] = []
        self.previous: weakref.ref[Group] | None = None
        self.opened = False

    def fetch(self) -> None:
        """Ask for all that is away, what was put last first: the backward wants it first."""
        for ref in reversed(self.records):
            record = ref()
            if record is not None:
                record.fetch()

    def open(self) -> None:
        """Called with every read; the first brings this group and the one before it."""
        if self.opened:
            return
        self.opened = True
        self.fetch()
        previous = self.previous() if self.previous is not None else None
        if previous is not None:
            previous.fetch()


class Record:
    """A storage: on the device (`held`), in host memory (`host`), or between the two.

    It lives as long as a handle on it does, so a graph that is freed, used or not, gives
    everything back: after a failed forward too.
    """

    def __init__(self, stash: Stash, tensor: Tensor, *, keep: bool) -> None:
        self.stash = stash
        self.held: Tensor | None = storage_bytes(tensor)
        self.nbytes = self.held.numel()
        self.device = tensor.device
        self.alias = StorageWeakRef(tensor.untyped_storage())
        self.version = tensor._version
        self.watched: Tensor | None = tensor.detach()  # shares the version
        self.host: Tensor | None = None
        self.event: Event = None
        self.in_flight = self.arriving = False
        self.readers = self.reads = 0
        if not keep:
            self.host = stash.ring.take(self.nbytes)
            target = self.host[: self.nbytes]
            self.event = stash.streams.copy(target, self.held, stash.streams.compute_event())
            self.in_flight = True
            stash.bytes_out += self.nbytes

    def let_go(self) -> None:
        """The copy that leaves is ordered before all later compute: its source may be reused."""
        if self.arriving or self.host is None:
            return
        if self.watched is not None and self.watched._version != self.version:
            raise RuntimeError(
                "activation offloading: a tensor saved for the backward was modified in place "
                f"while it was copied to the host (shape {tuple(self.watched.shape)}); modify a "
                "copy of it"
            )
        self._drop()

    def fetch(self) -> None:
        """Ask for it back; nothing where it is still, or already, on the device."""
        if self.held is not None or self.host is None:
            return
        streams = self.stash.streams
        # Made on the compute stream, whose earlier work may still be using that memory: hence
        # `after`. It is therefore free for compute again without ado, too.
        self.held = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        self.event = streams.copy(self.held, self.host[: self.nbytes], streams.compute_event())
        self.in_flight = self.arriving = True
        self.stash.bytes_back += self.nbytes

    def read(self) -> Tensor:
        """Its bytes on the device. After the last reader they are that reader's alone."""
        if self.held is None:
            self.fetch()
        if self.arriving and self.in_flight:
            self.stash.streams.wait(self.event)
            self.in_flight = False
        held = self.held
        assert held is not None
        self.reads += 1
        if self.reads >= self.readers and self.host is not None:
            self.reads = 0
            self.let_go()
            self._drop()
        return held

    def _drop(self) -> None:
        if self.in_flight:
            self.stash.streams.wait(self.event)
        self.held = self.watched = self.event = None
        self.in_flight = self.arriving = False

    def __del__(self) -> None:
        with suppress(Exception):  # at the interpreter's end modules are gone
            self._drop()
            self.stash.forget(self)
            if self.host is not None:
                self.stash.ring.give(self.host)


class Handle:
    """A tensor that was put away: a view of a record."""

    def __init__(self, record: Record, group: Group, tensor: Tensor) -> None:
        record.readers += 1
        self.record, self.group = record, group
        self.dtype, self.offset = tensor.dtype, tensor.storage_offset()
        self.size, self.stride = tensor.size(), tensor.stride()

    def get(self) -> Tensor:
        """The tensor, bit for bit, with its strides, without its graph."""
        self.group.open()
        held = self.record.read()
        tensor = torch.empty(0, dtype=self.dtype, device=held.device)
        return tensor.set_(held.untyped_storage(), self.offset, self.size, self.stride)


class Stash:
    """Where the tensors of one device are put away; the ring and the side stream are its own."""

    def __init__(
        self,
        device: torch.device,
        *,
        in_flight: int = 2,
        folder: str | Path | None = None,
        streams: Streams | None = None,
    ) -> None:
        self.streams = streams_of(device) if streams is None else streams
        self.ring = Ring(HostMemory(device, folder))
        self.in_flight = in_flight
        self.bytes_out = self.bytes_back = 0
        self._leaving: deque[weakref.ref[Record]] = deque()
        self._of_storage: dict[int, weakref.ref[Record]] = {}
        self._last: weakref.ref[Group] | None = None

    def put(self, tensor: Tensor, group: Group, *, keep: bool = False) -> Handle:
        """Put a tensor away, once for all tensors on its storage; `keep` leaves it where it is."""
        record = self._known(tensor)
        if record is None:
            record = Record(self, tensor, keep=keep)
            self._of_storage[tensor.untyped_storage()._cdata] = weakref.ref(record)
            if not keep:
                self._leaving.append(weakref.ref(record))
        if not group.records:
            group.previous, self._last = self._last, weakref.ref(group)
        group.records.append(weakref.ref(record))
        handle = Handle(record, group, tensor)
        # Never more on its way out than `in_flight`: compute waits for the oldest.
        while len(self._leaving) > self.in_flight:
            oldest = self._leaving.popleft()()
            if oldest is not None:
                oldest.let_go()
        return handle

    def _known(self, tensor: Tensor) -> Record | None:
        ref = self._of_storage.get(tensor.untyped_storage()._cdata)
        record = None if ref is None else ref()
        # The same address is the same storage: the record's weak reference (`alias`) keeps it from
        # being given to another. The same bytes it is only while nobody has written to it.
        return record if record is not None and record.version == tensor._version else None

    def forget(self, record: Record) -> None:
        """A record's end; its storage may be put away anew."""
        ref = self._of_storage.get(record.alias.cdata)
        if ref is not None and ref() in (None, record):
            del self._of_storage[record.alias.cdata]
