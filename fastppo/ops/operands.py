"""Operands of the head's GEMM: hidden states and head as a caller gives them, checked and cast."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastppo.ops.arguments import rows_and_lead
from fastppo.ops.checks import (
    check_device,
    check_floating,
    check_integer,
    check_vector,
    show,
    wrong_kind,
)
from fastppo.ops.config import HeadLora
from fastppo.ops.dtensors import local_head, refuse_dtensor
from fastppo.ops.head import Head
from fastppo.ops.shapes import checked_vocab_size

# What is no DTensor, by a look at the type alone.
_PLAIN: Final = (Tensor, torch.nn.Parameter, type(None))  # torch 2.8 traces no set of classes
# Devices that have autocast; asked here, because torch 2.8 does not trace the question.
_AUTOCAST: Final = tuple(
    device
    for device in ("cpu", "cuda", "mps", "xpu", "hpu")
    if torch.amp.is_autocast_available(device)
)


class Operands(NamedTuple):
    """Hidden states as (N, D), a head of one dtype with them, and the shape of the tokens."""

    hidden_ND: Tensor
    head: Head
    lead: torch.Size


def operands(
    op: str,
    hidden_ND: Tensor,
    head: Head,
    *,
    vocab_size: int | None = None,
    prefix: str = "",
    group: dist.ProcessGroup | None = None,
) -> Operands:
    """Hidden states (..., D) and a head, checked, under autocast cast as `nn.Linear` casts them.

    With `vocab_size` the head is a view of its first rows; autograd gives the others 0. `prefix`
    is that of the arguments' names: "ref_" for the reference's. With `group` the head is a shard of
    the group's, and what lies past `vocab_size` is cut off when all its shards are known.
    """
    plain = type(hidden_ND) in _PLAIN and type(head.weight_VD) in _PLAIN
    if not plain or type(head.bias_V) not in _PLAIN or group is not None or head.lora is not None:
        refuse_dtensor(op, f"{prefix}hidden_ND", hidden_ND)
        head = local_head(op, head, group, prefix)
    hidden_ND, lead = rows_and_lead(op, f"{prefix}hidden_ND", hidden_ND)
    check_kinds(op, hidden_ND, head, prefix)
    if vocab_size is not None and group is None:
        head = head.first_words(checked_vocab_size(op, vocab_size, head.weight_VD.shape[0]))
    device = hidden_ND.device.type
    if device in _AUTOCAST and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_ND, head = _cast(hidden_ND, dtype), head.map(lambda x: _cast(x, dtype))
    check_head(op, hidden_ND, head, prefix)
    return Operands(hidden_ND, head, lead)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does: float64 stays."""
    return x if x.dtype in (dtype, torch.float64) else x.to(dtype)


def logits_dtype_of(op: str, hidden_ND: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """The dtype of the GEMM's result: float32 of 16-bit operands, unless their own is asked for."""
    own = hidden_ND.dtype
    if asked is None:
        return torch.float32 if own.itemsize == 2 else own
    if not isinstance(asked, torch.dtype):
        wrong_kind(op, "logits_dtype", asked, "a torch.dtype or None")
    if asked == own:
        return own
    if asked != torch.float32 or own == torch.float64:
        raise ValueError(
            f"{op}: logits_dtype must be that of hidden_ND, {own}, or a wider torch.float32, "
            f"came {asked}"
        )
    return asked


def check_chunk_bytes(op: str, chunk_bytes: int | None) -> None:
    check_integer(op, "chunk_bytes", chunk_bytes, optional=True)
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"{op}: chunk_bytes must be at least 1 or None, came {chunk_bytes}")


def check_kinds(op: str, hidden_ND: Tensor, head: Head, prefix: str = "") -> None:
    """Check that a head is made of tensors of floats, on the device of the hidden states."""
    check_floating(op, f"{prefix}weight_VD", head.weight_VD, ndim=2)
    check_device(op, f"{prefix}weight_VD", head.weight_VD, hidden_ND)
    check_vector(op, "bias_V", head.bias_V, hidden_ND, n=head.weight_VD.shape[0], optional=True)
    lora = head.lora
    if lora is None:
        return
    if not isinstance(lora, HeadLora):
        wrong_kind(op, f"{prefix}head_lora", lora, "a HeadLora or None")
    for name, x in (("A_RD", lora.A_RD), ("B_VR", lora.B_VR)):
        check_floating(op, f"{prefix}head_lora.{name}", x)
        check_device(op, f"{prefix}head_lora.{name}", x, hidden_ND)


def check_head(op: str, hidden_ND: Tensor, head: Head, prefix: str = "") -> None:
    """Check that shapes and dtypes fit together."""
    vocab, size = head.weight_VD.shape
    if hidden_ND.shape[1] != size:
        raise ValueError(
            f"{op}: {prefix}hidden_ND must have {size} columns, as weight_VD has, "
            f"came {hidden_ND.shape[1]}"
        )
    if hidden_ND.dtype != head.weight_VD.dtype:
        raise TypeError(
            f"{op}: {prefix}hidden_ND and {prefix}weight_VD must have one dtype, "
            f"came {hidden_ND.dtype} and {head.weight_VD.dtype}; cast one of them, "
            "or call it under torch.autocast"
        )
    if head.lora is not None:
        a, b = tuple(head.lora.A_RD.shape), tuple(head.lora.B_VR.shape)
        if len(a) != 2 or b != (vocab, a[0]) or a[1] != size:
            raise ValueError(
                f"{op}: {prefix}head_lora must be A (R, {size}) and B ({vocab}, R), "
                f"came {show(a)} and {show(b)}"
            )
