"""What the ops refuse, said in one line: the op, the argument, what was wanted, what came.

Only what the host knows is checked (shapes, dtypes, devices): reading a value would wait for the
device.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100


def stat_dtype(*tensors: Tensor) -> torch.dtype:
    """Float32, or float64 where any input is: the dtype in which statistics are computed."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def show(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def floating(op: str, name: str, tensor: Tensor, *, ndim: int) -> None:
    """`tensor` holds floats and has `ndim` dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, came {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must hold floats, came {tensor.dtype}")
    if tensor.ndim != ndim:
        letters = {1: "(N,)", 2: "two dimensions"}[ndim]
        raise ValueError(
            f"{op}: {name} must have {letters}, came {show(tuple(tensor.shape))}; "
            "flatten or pack batch and time first"
        )


def row_vector(
    op: str, name: str, tensor: Tensor | None, like: Tensor, *, n: int, mask: bool = False
) -> None:
    """`tensor`, if given, is (n,) on the device of `like`: floats, or anything for a mask."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, came {type(tensor).__name__}")
    if not mask and not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must hold floats, came {tensor.dtype}")
    if tuple(tensor.shape) != (n,):
        raise ValueError(f"{op}: {name} must have shape ({n},), came {show(tuple(tensor.shape))}")
    same_device(op, name, tensor, like)


def same_device(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, came {tensor.device}; move it")


def tokens(
    op: str, token_N: Tensor, like: Tensor, *, n: int, vocab: int, ignore_index: int, check: bool
) -> None:
    """`token_N` is (n,) of integers; its values are read only if `check`."""
    if not isinstance(token_N, Tensor):
        raise TypeError(f"{op}: token_N must be a tensor, came {type(token_N).__name__}")
    if token_N.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: token_N must be int64 (or int32), came {token_N.dtype}")
    if tuple(token_N.shape) != (n,):
        raise ValueError(
            f"{op}: token_N must have shape ({n},), one entry a row, "
            f"came {show(tuple(token_N.shape))}"
        )
    same_device(op, "token_N", token_N, like)
    if vocab < 1:
        raise ValueError(f"{op}: the vocabulary is empty")
    if check:
        wrong = ((token_N < 0) | (token_N >= vocab)) & (token_N != ignore_index)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"{op}: token_N must lie in [0, {vocab}) or be {ignore_index} (ignored), "
                f"came {int(token_N[at])} at {at}"
            )


def scalar(op: str, name: str, value: float | Tensor | None, like: Tensor) -> None:
    """A float, or a 0-d tensor of floats on the device of `like`."""
    if not isinstance(value, Tensor):
        return
    if value.ndim != 0:
        raise ValueError(
            f"{op}: {name} must be a float or a 0-d tensor, came {show(tuple(value.shape))}"
        )
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must hold a float, came {value.dtype}")
    same_device(op, name, value, like)


def temperature(op: str, value: float | Tensor, like: Tensor, *, n: int) -> None:
    """A positive float, a 0-d tensor, or a tensor (n,)."""
    if isinstance(value, Tensor):
        if value.ndim == 0:
            scalar(op, "temperature", value, like)
        else:
            row_vector(op, "temperature", value, like, n=n)
        return
    if not value > 0:
        raise ValueError(f"{op}: temperature must be positive, came {value}")


def softcap(op: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{op}: softcap must be positive or None, came {value}")


def offsets(op: str, value: Tensor, like: Tensor, *, n: int) -> None:
    """Integers (B+1,), from 0 to n and ascending; the values are read where they lie on the CPU."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: offsets must be a tensor, came {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: offsets must be int32 (or int64), came {value.dtype}")
    if value.ndim != 1 or value.numel() < 1:
        raise ValueError(
            f"{op}: offsets must have shape (B+1,), came {show(tuple(value.shape))}; "
            "it holds the start of each sequence and, last, N"
        )
    same_device(op, "offsets", value, like)
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(value[0]) != 0 or int(value[-1]) != n:
            raise ValueError(
                f"{op}: offsets must start at 0 and end at N={n}, "
                f"came {int(value[0])} and {int(value[-1])}"
            )
        if bool((value[1:] < value[:-1]).any()):
            raise ValueError(f"{op}: offsets must ascend, came {value.tolist()}")


def unit_interval(op: str, name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: {name} must lie in [0, 1], came {value}")


def inplace(op: str, logits_NV: Tensor) -> None:
    """Logits that an op may write over: their own memory, and no parameter's."""
    base = logits_NV._base
    if logits_NV.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        what = "a leaf" if logits_NV.is_leaf else "a view of a leaf"
        raise ValueError(
            f"{op}: inplace=True needs logits that some operation made, came {what}; leave it out"
        )
    if _overlaps(logits_NV):
        raise ValueError(
            f"{op}: inplace=True needs logits of their own memory, "
            "came an expanded or overlapping tensor; leave it out"
        )
    if torch.compiler.is_compiling():
        raise ValueError(f"{op}: inplace=True does not go through torch.compile; leave it out")


def _overlaps(x_NV: Tensor) -> bool:
    """Whether two entries of a matrix may share memory."""
    reach = 0  # of the dimensions seen so far, the innermost first
    for stride, size in sorted(zip(x_NV.stride(), x_NV.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
