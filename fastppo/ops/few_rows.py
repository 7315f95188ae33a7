"""A linear layer of few rows on a CPU: as long as its weight takes to read, in any batch the same.

A library's GEMM packs the weight before it multiplies; for the few rows of a decoding step that
costs several times what the step does.
"""

from __future__ import annotations

from ctypes import byref
from typing import Final

import torch
from torch import Tensor

from fastppo.ops import backend
from fastppo.ops.backends.native import DTYPES, Call
from fastppo.ops.native_library import LIBRARY, FewRowsStruct

# Above, packing the weight pays.
MOST_ROWS: Final = 32


def runs_native(weight_VD: Tensor) -> bool:
    """Whether a layer with this weight has a kernel of its own here."""
    return (
        weight_VD.device.type == "cpu"
        and weight_VD.dtype in DTYPES
        and backend.choose("linear", None, weight_VD) == "native"
    )


def suits(x: Tensor, weight_VD: Tensor) -> bool:
    """Whether `few_rows_linear` computes this product: few rows, one dtype, and no gradient."""
    return (
        x.numel() <= MOST_ROWS * x.shape[-1]
        and x.dtype == weight_VD.dtype
        and weight_VD.stride(1) == 1
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def few_rows_linear(x: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """x W^T + b of x (..., D), W (V, D) and b (V,) of one dtype of `DTYPES`, on the CPU: (..., V).

    Products are summed in float32 and rounded once. A row's result depends on nothing beside it:
    it is the same to the bit in any batch, and for any number of threads.
    """
    v, d = weight_VD.shape
    rows, call = x.numel() // d, Call()
    out_NV = torch.empty(rows, v, dtype=torch.float32)
    arguments = FewRowsStruct(
        x=call.floats(x),
        weight=call.pointer(weight_VD),
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
