"""Large memory that the operators write on a CPU, kept from call to call.

New memory costs a page fault every 4 KiB, as much as the arithmetic on it, and what the C library
is given back at this size it returns to the system at once. So the last buffers are kept, and one
that nobody uses any more (the gradient was freed, the chunk is done) is written over by the next
call, as CUDA's caching allocator does for everything. Other devices are left to it.
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
    """Whether no tensor has it: the only reference left is the one kept here."""
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


def fresh_like(x: Tensor) -> Tensor:
    """`fresh` with the shape, dtype and device of a matrix."""
    return fresh((x.shape[0], x.shape[1]), x.dtype, x.device)


@contextmanager
def nothing_kept() -> Iterator[None]:
    """As if for the first time: new memory inside, and what was kept is there again after it."""
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
    """Give back what is kept; tensors that are in use stay as they are."""
    with _lock:
        _kept.clear()
