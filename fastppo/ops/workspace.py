"""Buffers for large results of the operators on a CPU, reused from call to call.

New memory costs a page fault every 4 KiB, as much as the arithmetic on it, and the C library
returns freed memory of this size to the system at once. So the last buffers are kept; a buffer that
is no longer in use (the gradient was freed, the chunk is done) is reused by the next call. CUDA's
caching allocator does the same for its devices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Final

import torch
from torch import Tensor

from fastppo.ops import native_library

SMALLEST: Final = 1 << 20  # below it the C library keeps memory itself
LARGEST: Final = 256 << 20  # above it memory is too much to keep, and huge pages come slowly
BUFFERS: Final = 3  # of one call: logits, their gradient in another dtype, that of the head

_kept: deque[torch.UntypedStorage] = deque(maxlen=BUFFERS)
_lock = Lock()


def _idle(storage: torch.UntypedStorage) -> bool:
    """Whether no tensor uses the storage: the only reference left is the one kept here."""
    return bool(torch._C._storage_Use_Count(storage._cdata) == 1)


def fresh(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous matrix, which owns its memory as `torch.empty`'s does."""
    rows, columns = size
    nbytes = rows * columns * dtype.itemsize
    if device.type != "cpu" or not SMALLEST <= nbytes <= LARGEST:
        return torch.empty(size, dtype=dtype, device=device)
    with _lock:
        for storage in _kept:
            # Not one of twice the size: whoever saves the tensor saves all of its memory.
            if nbytes <= storage.nbytes() <= 2 * nbytes and _idle(storage):
                return torch.empty(0, dtype=dtype).set_(storage, 0, size, (columns, 1))
        out = torch.empty(size, dtype=dtype)
        if native_library.LIBRARY is not None:
            # Huge pages: 512 times fewer faults.
            native_library.LIBRARY.fastppo_advise(out.data_ptr(), nbytes)
        _kept.append(out.untyped_storage())
    return out


def fresh_rows(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`fresh` for logits; on a GPU every row begins at an address that 16 divides."""
    if device.type == "cpu":
        return fresh((rows, vocab), dtype, device)
    vector = 16 // dtype.itemsize or 1
    return fresh((rows, -(-vocab // vector) * vector), dtype, device)[:, :vocab]


def fresh_like(x: Tensor, *, beside: bool = False) -> Tensor:
    """`fresh` with the shape, dtype and device of a matrix.

    `beside` has it begin as far past an address that 16 divides as `x` does: rows of both can then
    be read and written in the same vectors, also where `x` is cut out of a packed tensor.
    """
    past = x.data_ptr() % 16 // x.element_size() if beside else 0
    if not past:
        return fresh((x.shape[0], x.shape[1]), x.dtype, x.device)
    memory = torch.empty(past + x.numel(), dtype=x.dtype, device=x.device)
    return memory[past:].view(x.shape)


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Inside the block no buffers are kept, so memory is new; afterwards the old ones are back."""
    with _lock:
        before = list(_kept)
        _kept.clear()
    try:
        yield
    finally:
        with _lock:
            _kept.clear()
            _kept.extend(before)


def release() -> None:
    """Free the kept buffers; tensors that are in use are not affected."""
    with _lock:
        _kept.clear()
