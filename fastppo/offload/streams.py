"""A side stream for copies between device and host, and the host memory that they use.

Activations and frozen models are copied between device and host through a `Streams`. On an
accelerator its copies overlap with compute; on a CPU they run immediately. Tests replace it with a
recorder of copies and waits.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastppo.errors import UserError

Event = Any


class Streams(Protocol):
    """The compute stream, a side stream, and events with which one waits for the other."""

    def compute_event(self) -> Event:
        """An event after all work that is queued on the compute stream now."""

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        """Copy on the side stream after the event `after`; returns an event at the copy's end."""

    def wait(self, event: Event) -> None:
        """Make later work of the compute stream wait for `event`; the host does not wait."""


class HostStreams:
    """The streams of a CPU: a copy is complete when the call returns; waiting does nothing."""

    def compute_event(self) -> Event:
        return None

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        del after
        target.copy_(source)
        return None

    def wait(self, event: Event) -> None:
        pass


class DeviceStreams:
    """The streams of an accelerator, with one side stream for both directions.

    So copies run in the order in which they are queued, and a host buffer may be reused as soon as
    its last copy is queued, without an event.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module = torch.get_device_module(device)
        self.side = self.module.Stream(device)

    def compute_event(self) -> Event:
        event = self.module.Event()
        event.record(self.module.current_stream(self.device))
        return event

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        self.side.wait_event(after)
        host = source if source.device.type == "cpu" else target
        with self.module.stream(self.side):
            target.copy_(source, non_blocking=host.is_pinned())
        event = self.module.Event()
        event.record(self.side)
        return event

    def wait(self, event: Event) -> None:
        self.module.current_stream(self.device).wait_event(event)


def streams_of(device: torch.device) -> Streams:
    """The streams for copies to and from `device`."""
    return HostStreams() if device.type == "cpu" else DeviceStreams(device)


class HostMemory:
    """Allocates host buffers: pinned for an accelerator, plain for a CPU, or files in `folder`.

    A file is deleted from its folder as soon as it is mapped, so that its space is freed when the
    process ends for any reason.
    """

    def __init__(self, device: torch.device, folder: str | Path | None = None) -> None:
        self.pin = device.type != "cpu" and folder is None
        self.folder = None if folder is None else Path(folder)

    def rounded(self, nbytes: int) -> int:
        """`nbytes` rounded up, so that batches of similar length have buffers of the same size.

        Pinned memory is rounded to a power of two, as PyTorch does anyway; other memory is rounded
        to one of eight sizes between two powers.
        """
        power = 1 << max(6, (nbytes - 1).bit_length())
        step = power if self.pin else power // 16
        return -(-nbytes // step) * step

    def empty(self, nbytes: int) -> Tensor:
        """An uninitialised buffer, uint8 (nbytes,)."""
        if self.folder is None:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.pin)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(suffix=".offload", dir=self.folder)
        except OSError as error:
            raise UserError(
                f"offload_dir: {self.folder}: {error.strerror}; name a folder that can be written"
            ) from None
        try:
            os.close(handle)
            return torch.from_file(name, shared=True, size=nbytes, dtype=torch.uint8)
        finally:
            with suppress(OSError):  # Windows cannot delete a mapped file
                os.unlink(name)


class Ring:
    """A pool of host buffers that are reused.

    Sizes are rounded up, so batches of similar length use the same buffers. A longer batch replaces
    shorter buffers by its own: there are never more buffers than were in use at the same time.
    """

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory
        self.free: list[Tensor] = []
        self.buffers = 0
        self.nbytes = 0

    def acquire(self, nbytes: int) -> Tensor:
        """A buffer of at least nbytes: the smallest free one that is large enough, or a new one."""
        sizes = [buffer.numel() for buffer in self.free]
        fits = [(size, i) for i, size in enumerate(sizes) if size >= nbytes]
        # By index: a destructor may call `release` in between, which only appends.
        if fits:
            return self.free.pop(min(fits)[1])
        if sizes:
            self.buffers -= 1
            self.nbytes -= self.free.pop(sizes.index(min(sizes))).numel()
        buffer = self.memory.empty(self.memory.rounded(nbytes))
        self.buffers += 1
        self.nbytes += buffer.numel()
        return buffer

    def release(self, buffer: Tensor) -> None:
        """Return a buffer to the pool."""
        self.free.append(buffer)


def storage_bytes(tensor: Tensor) -> Tensor:
    """The whole storage behind a tensor, uint8 (nbytes,); no copy."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)


def aligned(sizes: Sequence[int], to: int = 256) -> tuple[list[int], int]:
    """Offsets of parts of these sizes, each aligned to `to` bytes, and the total length."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // to) * to
    return offsets, end
