"""The one way into a Triton kernel, and where rows of logits lie."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastppo.ops.backends.sizes import VECTOR_BYTES


def start(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    arguments: tuple[Any, ...],
    **meta: Any,
) -> None:
    """Launch a kernel on the device of its tensors; every launch goes through here.

    Kernels read entry i of a vector at `ptr + i`, so a vector that is not contiguous is copied
    first. Results are contiguous.
    """
    packed = (x.contiguous() if isinstance(x, Tensor) and x.ndim == 1 else x for x in arguments)
    # Launches go to the current device, which may be another than the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*packed, **meta)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; a few for Triton's interpreter, which runs one program at a time."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def placement(x_NV: Tensor, other_NV: Tensor | None) -> dict[str, bool]:
    """Compile-time flags: where the rows of logits lie, and those of a gradient or a reference.

    ALIGNED says that 16 divides every row's address and length in bytes; TOGETHER, that the other
    rows have as many logits before their first such address, and logits of the same size.
    """
    if other_NV is None:
        return {"ALIGNED": _on_boundary(x_NV), "TOGETHER": True}
    aligned = _on_boundary(x_NV) and _on_boundary(other_NV)
    same = (
        x_NV.dtype == other_NV.dtype and (x_NV.data_ptr() - other_NV.data_ptr()) % VECTOR_BYTES == 0
    )
    gap = (x_NV.stride(0) - other_NV.stride(0)) * x_NV.element_size()
    return {"ALIGNED": aligned, "TOGETHER": aligned or (same and gap % VECTOR_BYTES == 0)}


def _on_boundary(x_NV: Tensor) -> bool:
    size = x_NV.element_size()
    places = (x_NV.data_ptr(), x_NV.stride(0) * size, x_NV.shape[1] * size)
    return all(place % VECTOR_BYTES == 0 for place in places)
