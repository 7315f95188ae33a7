"""A linear layer for few rows on a CPU: it takes as long as reading its weight once.

A library's GEMM packs the weight before it multiplies; for the few rows of a decoding step that
takes several times as long as the product.
"""

from __future__ import annotations

from ctypes import byref
from typing import Final

import torch
from torch import Tensor

from fastppo.ops import backend
from fastppo.ops.backends.native import DTYPES, Call
from fastppo.ops.native_library import LIBRARY, FewRowsStruct

# With more rows, packing the weight is faster.
MOST_ROWS: Final = 32


def runs_native(weight_VD: Tensor) -> bool:
    """Whether the native kernel can run a layer with this weight."""
    return (
        weight_VD.device.type == "cpu"
        and weight_VD.dtype in DTYPES
        and backend.choose("linear", None, weight_VD) == "native"
    )


def suits(x: Tensor, weight_VD: Tensor) -> bool:
    """Whether `few_rows_linear` can compute this product: few rows, one dtype, no gradient."""
    return (
        x.numel() <= MOST_ROWS * x.shape[-1]
        and x.dtype == weight_VD.dtype
        and weight_VD.stride(1) == 1
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def few_rows_linear(x: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """x W^T + b, (..., V), on the CPU.

    Products are summed in float32 and rounded once. The result of a row does not depend on other
    rows: it is the same bits in any batch and with any number of threads.

    Args:
        x: (..., D), of a dtype in `DTYPES`.
        weight_VD: (V, D), of the same dtype.
        bias_V: (V,), of the same dtype, or None.
    """
    v, d = weight_VD.shape
    rows, call = x.numel() // d, Call()
    out_NV = torch.empty(rows, v, dtype=torch.float32)
    arguments = FewRowsStruct(
        x=call.floats(x),
        weight=weight_VD.data_ptr(),
        weight_stride=weight_VD.stride(0),
        bias=call.floats(bias_V),
        out=out_NV.data_ptr(),
        n=rows,
        inputs=d,
        outputs=v,
        dtype=DTYPES[weight_VD.dtype],
    )
    LIBRARY.fastppo_few_rows(byref(arguments))
    return out_NV.to(x.dtype).view(*x.shape[:-1], v)
