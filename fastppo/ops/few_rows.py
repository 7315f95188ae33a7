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
    return FewRows(weight_VD, bias_V)(x)


class FewRows:
    """`few_rows_linear` of one layer, prepared: a call writes three numbers into a struct.

    A step of decoding runs some hundreds of small layers, and making the struct anew takes longer
    than some of the products. The weight must not be replaced while this is in use.
    """

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None) -> None:
        call = Call()
        self.weight, self.bias, self.kept = weight_VD, bias_V, call.kept
        self.outputs, self.inputs = weight_VD.shape
        self.dtype = weight_VD.dtype
        self.most = MOST_ROWS * self.inputs if weight_VD.stride(1) == 1 else -1
        self.arguments = FewRowsStruct(
            weight=weight_VD.data_ptr(),
            weight_stride=weight_VD.stride(0),
            bias=call.floats(bias_V),
            inputs=self.inputs,
            outputs=self.outputs,
            dtype=DTYPES[weight_VD.dtype],
        )
        self.reference = byref(self.arguments)

    def suits(self, x: Tensor) -> bool:
        """`suits` of x and the layer's weight."""
        return (
            x.numel() <= self.most
            and x.dtype is self.dtype
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + b, (..., V), for x that suits."""
        x32 = x if x.dtype is torch.float32 else x.float()
        if not x32.is_contiguous():
            x32 = x32.contiguous()
        out = torch.empty((*x.shape[:-1], self.outputs), dtype=torch.float32)
        arguments = self.arguments
        arguments.x, arguments.out = x32.data_ptr(), out.data_ptr()
        arguments.n = x32.numel() // self.inputs
        LIBRARY.fastppo_few_rows(self.reference)
        return out if x.dtype is torch.float32 else out.to(x.dtype)
