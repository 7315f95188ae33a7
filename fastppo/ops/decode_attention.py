"""Attention of one new token a row over its cached keys, on a CPU: a step of decoding."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from fastppo.ops.backends.native import DTYPES, Call
from fastppo.ops.native_library import LIBRARY, DecodeAttentionStruct


def suits(key: Tensor, value: Tensor) -> bool:
    """Whether `decode_attention` can read these keys and values: places side by side, one dtype."""
    return (
        key.device.type == "cpu"
        and key.dtype in DTYPES
        and key.dtype == value.dtype
        and key.stride()[2:] == (key.shape[3], 1)
        and value.stride()[2:] == (value.shape[3], 1)
    )


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_B: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """softmax(softcap(scale q K^T)) V of the last place, (B, 1, H, E).

    Sums are in float32, each in an order that depends on the row alone: a row's result is the same
    bits in any batch, however it is padded, and with any number of threads.

    Args:
        query: (B, H, 1, D).
        key: (B, G, T, D) with H a multiple of G; its last place is the new token's.
        value: (B, G, T, E), of key's dtype.
        first_B: int64, the first place that each row attends to.
        scale: factor of the products.
        softcap: c of c tanh(x / c), or None.
    """
    rows, heads, _, size = query.shape
    call = Call()
    out = torch.empty(rows, 1, heads, value.shape[3], dtype=torch.float32)
    arguments = DecodeAttentionStruct(
        query=call.floats(query),
        keys=key.data_ptr(),
        values=value.data_ptr(),
        key_row=key.stride(0),
        key_head=key.stride(1),
        value_row=value.stride(0),
        value_head=value.stride(1),
        first=first_B.data_ptr(),
        out=out.data_ptr(),
        rows=rows,
        heads=heads,
        kv_heads=key.shape[1],
        places=key.shape[2],
        size=size,
        value_size=value.shape[3],
        scale=scale,
        softcap=softcap or 0.0,
        dtype=DTYPES[key.dtype],
    )
    LIBRARY.fastppo_decode_attention(byref(arguments))
    return out.to(query.dtype)
