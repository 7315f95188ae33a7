"""Offload tensors to host memory and fetch them back, with prefetching."""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastppo.offload.streams import Event, HostMemory, Ring, Streams, storage_bytes, streams_of


class LayerGroup:
    """The tensors that one layer has offloaded; they are fetched together."""

    def __init__(self) -> None:
        self.storages: list[weakref.ref[OffloadedStorage]] = []
        self.previous: weakref.ref[LayerGroup] | None = None
        self.prefetched = False

    def fetch(self) -> None:
        """Start the copies back of all tensors, the last one first, as the backward reads them."""
        for ref in reversed(self.storages):
            storage = ref()
            if storage is not None:
                storage.fetch()

    def prefetch(self) -> None:
        """Fetch this group and the previous layer's; only the first call has an effect."""
        if self.prefetched:
            return
        self.prefetched = True
        self.fetch()
        previous = self.previous() if self.previous is not None else None
        if previous is not None:
            previous.fetch()


class OffloadedStorage:
    """A storage that is on the device (`on_device`), in host memory (`host`), or being copied.

    It lives as long as the tensors that view it. So freeing an autograd graph also frees device and
    host memory, even if its backward never ran or its forward failed.
    """

    def __init__(self, tensors: HostTensors, tensor: Tensor, *, keep: bool) -> None:
        self.owner = tensors
        self.on_device: Tensor | None = storage_bytes(tensor)
        self.nbytes = self.on_device.numel()
        self.device = tensor.device
        self.alias = StorageWeakRef(tensor.untyped_storage())
        self.version = tensor._version
        self.source: Tensor | None = tensor.detach()  # shares the tensor's version counter
        self.host: Tensor | None = None
        self.event: Event = None
        self.in_flight = self.arriving = False
        self.readers = self.reads = 0
        if not keep:
            self.host = tensors.ring.acquire(self.nbytes)
            target = self.host[: self.nbytes]
            self.event = tensors.streams.copy(
                target, self.on_device, tensors.streams.compute_event()
            )
            self.in_flight = True
            tensors.bytes_out += self.nbytes

    def release_device_copy(self) -> None:
        """Release the device's copy; compute must already wait for the copy to the host.

        Raises:
            RuntimeError: the tensor was modified in place while it was copied.
        """
        if self.arriving or self.host is None:
            return
        if self.source is not None and self.source._version != self.version:
            raise RuntimeError(
                "activation offloading: a tensor saved for the backward was modified in place "
                f"while it was copied to the host (shape {tuple(self.source.shape)}); modify a "
                "copy of it"
            )
        self._drop()

    def fetch(self) -> None:
        """Start the copy back to the device, unless it is there or has been started."""
        if self.on_device is not None or self.host is None:
            return
        streams = self.owner.streams
        # Allocated on the compute stream, whose earlier work may still use that memory, so the copy
        # waits for `after`; compute may reuse the memory later without waiting.
        self.on_device = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        self.event = streams.copy(self.on_device, self.host[: self.nbytes], streams.compute_event())
        self.in_flight = self.arriving = True
        self.owner.bytes_back += self.nbytes

    def read(self) -> Tensor:
        """The bytes on the device, fetched if necessary; the last read frees the host's copy."""
        if self.on_device is None:
            self.fetch()
        if self.arriving and self.in_flight:
            self.owner.streams.wait(self.event)
            self.in_flight = False
        on_device = self.on_device
        assert on_device is not None
        self.reads += 1
        if self.reads >= self.readers and self.host is not None:
            self.reads = 0
            self.release_device_copy()
            self._drop()
        return on_device

    def _drop(self) -> None:
        if self.in_flight:
            self.owner.streams.wait(self.event)
        self.on_device = self.source = self.event = None
        self.in_flight = self.arriving = False

    def __del__(self) -> None:
        with suppress(Exception):  # at the interpreter's exit, modules may be gone
            self._drop()
            self.owner.discard(self)
            if self.host is not None:
                self.owner.ring.release(self.host)


class OffloadedTensor:
    """An offloaded tensor: a view of an offloaded storage."""

    def __init__(self, storage: OffloadedStorage, group: LayerGroup, tensor: Tensor) -> None:
        storage.readers += 1
        self.storage, self.group = storage, group
        self.dtype, self.offset = tensor.dtype, tensor.storage_offset()
        self.size, self.stride = tensor.size(), tensor.stride()

    def get(self) -> Tensor:
        """The tensor on the device, with the same bits and strides and without autograd graph."""
        self.group.prefetch()
        on_device = self.storage.read()
        tensor = torch.empty(0, dtype=self.dtype, device=on_device.device)
        return tensor.set_(on_device.untyped_storage(), self.offset, self.size, self.stride)


class HostTensors:
    """Offloads the tensors of one device, with its own ring of host buffers and side stream.

    Args:
        device: the tensors' device.
        in_flight: largest number of copies to the host at a time.
        folder: a folder for memory-mapped files, used instead of host memory.
        streams: the streams for copies; None uses the device's.

    Attributes:
        bytes_out, bytes_back: bytes copied to the host, and back, so far.
    """

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
        self._copying_out: deque[weakref.ref[OffloadedStorage]] = deque()
        self._of_storage: dict[int, weakref.ref[OffloadedStorage]] = {}
        self._last: weakref.ref[LayerGroup] | None = None

    def offload(self, tensor: Tensor, group: LayerGroup, *, keep: bool = False) -> OffloadedTensor:
        """Start copying a tensor's storage to the host, once for all tensors that share it.

        Args:
            tensor: a tensor on the device.
            group: the group of the layer that saves it.
            keep: whether to leave it on the device.
        """
        storage = self._find(tensor)
        if storage is None:
            storage = OffloadedStorage(self, tensor, keep=keep)
            self._of_storage[tensor.untyped_storage()._cdata] = weakref.ref(storage)
            if not keep:
                self._copying_out.append(weakref.ref(storage))
        if not group.storages:
            group.previous, self._last = self._last, weakref.ref(group)
        group.storages.append(weakref.ref(storage))
        handle = OffloadedTensor(storage, group, tensor)
        # At most `in_flight` copies to the host at a time: compute waits for the oldest.
        while len(self._copying_out) > self.in_flight:
            oldest = self._copying_out.popleft()()
            if oldest is not None:
                oldest.release_device_copy()
        return handle

    def _find(self, tensor: Tensor) -> OffloadedStorage | None:
        ref = self._of_storage.get(tensor.untyped_storage()._cdata)
        storage = None if ref is None else ref()
        # The same address means the same storage: the weak reference (`alias`) keeps the address
        # from being reused. The bytes are the same only if the version is.
        return storage if storage is not None and storage.version == tensor._version else None

    def discard(self, storage: OffloadedStorage) -> None:
        """Remove a released storage, so that its address can be offloaded again."""
        ref = self._of_storage.get(storage.alias.cdata)
        if ref is not None and ref() in (None, storage):
            del self._of_storage[storage.alias.cdata]
