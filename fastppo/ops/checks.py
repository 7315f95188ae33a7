"""Checks of the operators' arguments on the host.

An error names the op, the argument, what was expected and what was given. Only what the host knows
is checked (kinds, shapes, dtypes, devices), because reading a value would wait for the device.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Final, NoReturn

import torch
from torch import Tensor

# A traced number is one too; numpy's scalars are registered with `numbers`.
NUMBERS: Final = (float, int, Real, torch.SymFloat, torch.SymInt)
INTEGERS: Final = (int, Integral, torch.SymInt)


def show(shape: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def wrong_kind(op: str, name: str, value: object, wanted: str) -> NoReturn:
    """Raise the TypeError that names the argument, what was wanted and what came."""
    came = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"{op}: {name} must be {wanted}, came {came}")


def check_floating(op: str, name: str, tensor: Tensor, *, ndim: int | None = None) -> None:
    """Check that `tensor` is floating point and, where that is given, has `ndim` dimensions."""
    if not isinstance(tensor, Tensor):
        wrong_kind(op, name, tensor, "a tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must hold floats, came {tensor.dtype}")
    if ndim is not None and tensor.ndim != ndim:
        letters = {1: "(N,)", 2: "two dimensions"}[ndim]
        raise ValueError(
            f"{op}: {name} must have {letters}, came {show(tuple(tensor.shape))}; "
            "flatten or pack batch and time first"
        )


def check_vector(
    op: str,
    name: str,
    tensor: Tensor | None,
    like: Tensor,
    *,
    n: int | torch.Size,
    mask: bool = False,
    optional: bool = False,
) -> None:
    """Check that `tensor` is (n,) or of shape n, on the device of `like`; floats unless a mask."""
    if (
        isinstance(tensor, Tensor)
        and tensor.shape == n
        and (mask or tensor.is_floating_point())
        and tensor.device == like.device
    ):
        return  # what is right takes no longer than it must
    if not isinstance(tensor, Tensor):
        if tensor is None and optional:
            return
        wrong_kind(op, name, tensor, "a tensor or None" if optional else "a tensor")
    if not mask and not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must hold floats, came {tensor.dtype}")
    shape = n if isinstance(n, tuple) else (n,)
    if tensor.shape != shape:
        raise ValueError(
            f"{op}: {name} must have shape {show(shape)}, came {show(tuple(tensor.shape))}"
        )
    check_device(op, name, tensor, like)


def check_device(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, came {tensor.device}; move it")


def check_number(op: str, name: str, value: float | None, *, positive: bool = True) -> None:
    """Check that `value` is None or a number and, with `positive`, above 0."""
    if value is None:
        return
    if not isinstance(value, NUMBERS):
        wrong_kind(op, name, value, "a number or None")
    if positive and not value > 0:
        raise ValueError(f"{op}: {name} must be positive or None, came {value}")


def check_flag(op: str, name: str, value: bool) -> None:
    if not isinstance(value, bool):
        wrong_kind(op, name, value, "True or False")


def check_integer(op: str, name: str, value: int | None, *, optional: bool = False) -> None:
    if not isinstance(value, INTEGERS) and not (optional and value is None):
        wrong_kind(op, name, value, "an integer or None" if optional else "an integer")


def check_scalar(op: str, name: str, value: float | Tensor | None, like: Tensor) -> None:
    """Check that `value` is a float, or a 0-d floating-point tensor on the device of `like`."""
    if not isinstance(value, Tensor):
        if not isinstance(value, NUMBERS):
            wrong_kind(op, name, value, "a number or a 0-d float tensor")
        return
    if value.ndim != 0:
        raise ValueError(
            f"{op}: {name} must be a float or a 0-d tensor, came {show(tuple(value.shape))}"
        )
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must hold a float, came {value.dtype}")
    check_device(op, name, value, like)


def check_unit_interval(op: str, name: str, value: float) -> None:
    if not isinstance(value, NUMBERS):
        wrong_kind(op, name, value, "a number in [0, 1]")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: {name} must lie in [0, 1], came {value}")


def check_offsets(op: str, value: Tensor, like: Tensor, *, n: int) -> None:
    """Check offsets: integers (B+1,), ascending from 0 to n; values are read only on the CPU."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: offsets must be a tensor, came {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: offsets must be int32 (or int64), came {value.dtype}")
    if value.ndim != 1 or value.numel() < 1:
        raise ValueError(
            f"{op}: offsets must have shape (B+1,), came {show(tuple(value.shape))}; "
            "it holds the start of each sequence and, last, N"
        )
    check_device(op, "offsets", value, like)
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(value[0]) != 0 or int(value[-1]) != n:
            raise ValueError(
                f"{op}: offsets must start at 0 and end at N={n}, "
                f"came {int(value[0])} and {int(value[-1])}"
            )
        if bool((value[1:] < value[:-1]).any()):
            raise ValueError(f"{op}: offsets must ascend, came {value.tolist()}")


def check_inplace(op: str, logits_NV: Tensor, rows_NV: Tensor) -> None:
    """Check that an op may overwrite the logits: no leaf, no expanded or overlapping memory.

    `rows_NV` are the same as a matrix, which must be a view of them.
    """
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
    if rows_NV.untyped_storage().data_ptr() != logits_NV.untyped_storage().data_ptr():
        raise ValueError(
            f"{op}: inplace=True needs logits that can be viewed as rows, came a part of "
            "(B, T, V); give all of it with shifted tokens, or leave it out"
        )


def _overlaps(x_NV: Tensor) -> bool:
    """Whether two entries of a matrix may share memory."""
    reach = 0  # largest offset in the dimensions seen so far, the innermost first
    for stride, size in sorted(zip(x_NV.stride(), x_NV.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check_range(op: str, token: Tensor, vocab: int, ignore_index: int) -> None:
    """Check that each token is in the vocabulary or ignored; this waits for the device."""
    wrong = ((token < 0) | (token >= vocab)) & (token != ignore_index)
    if bool(wrong.any()):
        at = int(wrong.flatten().nonzero()[0])
        raise ValueError(
            f"{op}: token_N must lie in [0, {vocab}) or be {ignore_index} (ignored), "
            f"came {int(token.flatten()[at])} at {at}"
        )
