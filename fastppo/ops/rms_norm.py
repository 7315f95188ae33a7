"""RMS norm on a CPU, in one pass: a step of decoding runs two a layer on a few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops.native_library import LIBRARY


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x weight / sqrt(mean(x^2) + eps) over the last dimension, float32, on the CPU.

    Args:
        x: float32 (..., D).
        weight_D: float32, contiguous.
        eps: added to the mean of squares.
    """
    if not x.is_contiguous():
        x = x.contiguous()
    out, size = torch.empty_like(x), weight_D.numel()
    LIBRARY.fastppo_rms_norm(
        x.data_ptr(), weight_D.data_ptr(), eps, x.numel() // size, size, out.data_ptr()
    )
    return out
