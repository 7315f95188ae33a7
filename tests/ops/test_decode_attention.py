"""Attention of one new token a row: right, and the same to the bit in any batch."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo.ops import native_library
from fastppo.ops.decode_attention import decode_attention, suits

pytestmark = pytest.mark.skipif(
    native_library.LIBRARY is None, reason=f"no native kernels: {native_library.OBSTACLE}"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(rows, heads, kv_heads, places, size, value_size, dtype=torch.float32):
    """Keys and values are views into a cache, with NaN where no row may read."""
    torch.manual_seed(rows + heads + places + size)
    first_B = torch.randint(0, places, (rows,))
    first_B[0] = 0
    cache = [torch.full((rows + 1, kv_heads, places + 5, n), torch.nan) for n in (size, value_size)]
    for x in cache:
        for row, first in enumerate(first_B.tolist()):
            x[row, :, 2 + first : 2 + places] = torch.randn(kv_heads, places - first, x.shape[3])
    key, value = (x.to(dtype)[:rows, :, 2 : 2 + places] for x in cache)
    return torch.randn(rows, heads, 1, size).to(dtype), key, value, first_B


def reference(query, key, value, first_B, scale, softcap):
    """In float64, row by row."""
    rows = []
    for b, first in enumerate(first_B.tolist()):
        k, v = (
            x[b, :, first:].double().repeat_interleave(query.shape[1] // key.shape[1], 0)
            for x in (key, value)
        )
        scores = query[b].double() @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        rows.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.stack(rows)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "places", "size", "value_size"),
    [(1, 1, 1, 1, 1, 1), (3, 9, 3, 37, 64, 64), (4, 14, 2, 130, 64, 64), (2, 5, 5, 18, 13, 21)],
)
def test_it_is_attention(isa, dtype, softcap, rows, heads, kv_heads, places, size, value_size):
    given = operands(rows, heads, kv_heads, places, size, value_size, dtype)
    assert suits(*given[1:3])
    scale = 1.5 / math.sqrt(size)
    found = decode_attention(*given, scale=scale, softcap=softcap)
    assert found.dtype == dtype
    exact = reference(*given, scale, softcap)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, atol=3e-6 + eps, rtol=3e-6 + eps)


def test_a_row_is_the_same_to_the_bit_in_any_batch_and_however_it_is_padded(isa):
    query, key, value, first_B = operands(6, 9, 3, 61, 64, 64)
    together = decode_attention(query, key, value, first_B, scale=0.125)
    for row, first in enumerate(first_B.tolist()):
        here = slice(row, row + 1)
        own = (key[here, :, first:], value[here, :, first:], torch.zeros(1, dtype=torch.long))
        assert torch.equal(decode_attention(query[here], *own, scale=0.125), together[here])
        moved = [torch.cat([torch.full_like(x[:, :, :3], 9.0), x], 2) for x in own[:2]]
        again = decode_attention(query[here], *moved, own[2] + 3, scale=0.125)
        assert torch.equal(again, together[here])


def test_what_the_kernel_cannot_read_does_not_suit():
    _, key, value, _ = operands(2, 2, 2, 9, 8, 8)
    assert suits(key, value)
    assert not suits(key.double(), value.double())
    assert not suits(key, value.bfloat16())
    assert not suits(key.transpose(1, 2), value.transpose(1, 2))
    assert not suits(key[..., ::2], value[..., ::2])
