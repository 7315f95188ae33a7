"""A side stream for copies, and the host memory that they go to. What device runs is hidden here.

Both halves of the package that move bytes between device and host (`offload`, `streaming`) speak to
a `Streams`: on an accelerator its copies overlap with compute, on a CPU they happen at once, and
the tests put a recorder in its place to see the order in which things were asked for.
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
    """The compute stream, a side stream, and the events that order one after the other."""

    def compute_event(self) -> Event:
        """An event after everything that the compute stream was given so far."""

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        """Copy on the side stream once `after` has happened; the event of its end."""

    def wait(self, event: Event) -> None:
        """What the compute stream is given from now on runs after `event`. No host waits."""


class HostStreams:
    """A CPU: a copy is over when the call returns, and there is nothing to wait for."""

    def compute_event(self) -> Event:
        return None

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        del after
        target.copy_(source)
        return None

    def wait(self, event: Event) -> None:
        pass


class DeviceStreams:
    """An accelerator with streams. One side stream carries both directions.

    So copies run in the order in which they were asked for, and a host buffer may be written again
    as soon as its last copy has been asked for: no event is needed for that.
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
    """What orders copies to and from `device`."""
    return HostStreams() if device.type == "cpu" else DeviceStreams(device)


class HostMemory:
    """Where bytes go: pinned for an accelerator, plain for a CPU, a mapped file in `folder`.

    A file is removed from its folder as soon as it is mapped: its space is given back when the
    process ends, however it ends.
    """

    def __init__(self, device: torch.device, folder: str | Path | None = None) -> None:
        self.pin = device.type != "cpu" and folder is None
        self.folder = None if folder is None else Path(folder)

    def rounded(self, nbytes: int) -> int:
        """A capacity that batches of about one length share.

        PyTorch rounds pinned memory up to a power of two; other memory need not pay for that, so
        there are eight sizes between two powers.
        """
        power = 1 << max(6, (nbytes - 1).bit_length())
        step = power if self.pin else power // 16
        return -(-nbytes // step) * step

    def empty(self, nbytes: int) -> Tensor:
        """A buffer, uint8 (nbytes,)."""
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
            with suppress(OSError):  # Windows keeps a mapped file
                os.unlink(name)


class Ring:
    """Host buffers that are used over and over.

    Capacities are rounded up, so batches of about one length share their buffers. A longer batch
    puts its buffers in the place of shorter ones: there are never more than were in use at the same
    time.
    """

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory
        self.free: list[Tensor] = []
        self.buffers = 0
        self.nbytes = 0

    def take(self, nbytes: int) -> Tensor:
        """A buffer of at least nbytes, the smallest free one that will do."""
        sizes = [buffer.numel() for buffer in self.free]
        fits = [(size, i) for i, size in enumerate(sizes) if size >= nbytes]
        # By position, and `give` only appends: it may come in between, from a destructor.
        if fits:
            return self.free.pop(min(fits)[1])
        if sizes:
            self.buffers -= 1
            self.nbytes -= self.free.pop(sizes.index(min(sizes))).numel()
        buffer = self.memory.empty(self.memory.rounded(nbytes))
        self.buffers += 1
        self.nbytes += buffer.numel()
        return buffer

    def give(self, buffer: Tensor) -> None:
        """The buffer may be used again."""
        self.free.append(buffer)


def storage_bytes(tensor: Tensor) -> Tensor:
    """The whole storage behind a tensor, uint8 (nbytes,); no copy."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)


def aligned(sizes: Sequence[int], to: int = 256) -> tuple[list[int], int]:
    """Offsets of parts of these sizes laid one behind the other, and the length of it all."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // to) * to
    return offsets, end
