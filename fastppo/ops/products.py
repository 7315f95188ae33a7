"""Matrix products that accumulate in a wider dtype, and rows that fill a GPU's waves."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

import torch
from torch import Tensor

# What a library's GEMM gives to a multiprocessor at a time, in rows and columns of the result.
TILE_ROWS: Final = 128
TILE_COLUMNS: Final = 256

# Whether torch multiplies operands of one dtype into a wider one: by question, device and dtypes.
_widening: Final[dict[tuple[str, torch.device, torch.dtype, torch.dtype], bool]] = {}


def _asked(question: str, like: Tensor, wide: torch.dtype, answer: Callable[[], bool]) -> bool:
    """What torch can do, asked once: ROCm is a "cuda" device too, and refuses in some versions."""
    key = (question, like.device, like.dtype, wide)
    if key not in _widening:
        try:
            _widening[key] = answer()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError):
            _widening[key] = False
    return _widening[key]


def widens(like: Tensor, wide: torch.dtype) -> bool:
    """Whether torch gives out the accumulators of a GEMM as they are."""

    def answer() -> bool:
        one = like.new_ones(16, 16)
        torch.mm(one, one, out_dtype=wide, out=one.to(wide))
        return True

    return _asked("mm", like, wide, answer)


def adds_widely(like: Tensor, wide: torch.dtype) -> bool:
    """Whether torch adds a GEMM of narrow operands to a wide matrix in place."""

    def answer() -> bool:
        one = like.new_ones(16, 16)
        total = one.to(wide)
        torch.addmm(total, one, one, out_dtype=wide, alpha=0.5, out=total)
        return True

    return like.device.type != "cpu" and _asked("addmm", like, wide, answer)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0) -> None:
    """total += alpha a b, accumulated in the dtype of `total` where torch can, without a copy."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=alpha)
    elif adds_widely(a, total.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=alpha, out=total)
    else:
        total.add_(a @ b, alpha=alpha)


def first_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into = a b, whatever was in it: in its own dtype where torch can, without a copy."""
    if widens(a, into.dtype):
        torch.mm(a, b, out_dtype=into.dtype, out=into)
    else:
        into.copy_(a @ b)


@cache
def rows_of_whole_waves(n: int, most: int, vocab: int, hidden: int, multiprocessors: int) -> int:
    """How many of n rows to compute at a time, at most `most`, so that the GPU idles least.

    A GEMM's tiles go out in waves of one per multiprocessor, and the last wave is mostly idle. The
    logits' GEMM has rows x vocab of them, each over `hidden`; the gradient's rows x hidden, each
    over `vocab`. Of equal costs the largest number of rows is best, since each chunk reads the
    weight. The rows are a multiple of 128, or `most` where that is no worse.
    """

    def waves(rows: int, columns: int) -> int:
        tiles = -(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS)
        return -(-tiles // multiprocessors)

    def cost(rows: int) -> int:
        return waves(rows, vocab) * hidden + waves(rows, hidden) * vocab

    def total(rows: int) -> int:
        whole, rest = divmod(n, rows)
        return whole * cost(rows) + (cost(rest) if rest else 0)

    sizes = [most, *range(most // TILE_ROWS * TILE_ROWS, 0, -TILE_ROWS)]
    best: int = min(sizes, key=total)
    return best
