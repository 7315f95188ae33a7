"""Shapes of a caller's tensors: (..., V) for logits, (..., D) for hidden states, (...) for tokens.

The operators work on N rows. What leads the last dimension is flattened into N, as a view where
there is one (`rows_and_lead` in arguments.py), and results of one entry a token are given back in
the caller's shape. A mask over the tokens takes the place of packing: a token behind it is an
ignored one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops.checks import check_device, check_integer, show, wrong_kind


def in_shape(x_N: Tensor, lead: torch.Size) -> Tensor:
    """One entry a token in the shape of the tokens, as a view; further dimensions stay."""
    return x_N if len(lead) == 1 else x_N.view(lead + x_N.shape[1:])


def live_tokens(op: str, mask: Tensor, lead: torch.Size, like: Tensor, *, check: bool) -> Tensor:
    """A caller's mask as bools in its own shape, checked; with `check`, its values too."""
    if not isinstance(mask, Tensor):
        wrong_kind(op, "mask", mask, "a tensor or None")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"{op}: mask must hold bools, or integers 0 and 1, came {mask.dtype}; a weight of each "
            "token is no mask: multiply the loss by it (weight_N where the operator has one)"
        )
    if mask.shape != lead:
        raise ValueError(
            f"{op}: mask must have the shape of the tokens, {show(tuple(lead))}, "
            f"came {show(tuple(mask.shape))}"
        )
    check_device(op, "mask", mask, like)
    if mask.dtype == torch.bool:
        return mask
    if check and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"{op}: mask must hold 0 and 1, came {sorted(set(mask.flatten().tolist()))}"
        )
    return mask != 0


def first_words(op: str, x_NV: Tensor, vocab_size: int) -> Tensor:
    """The columns of the words, a view: a padded head has more."""
    return x_NV[:, : checked_vocab_size(op, vocab_size, x_NV.shape[1])]


def checked_vocab_size(op: str, vocab_size: int, rows: int) -> int:
    """`vocab_size`, if a head of so many rows has as many words."""
    check_integer(op, "vocab_size", vocab_size, optional=True)
    if not 1 <= vocab_size <= rows:
        raise ValueError(f"{op}: vocab_size must lie in [1, {rows}], came {vocab_size}")
    return vocab_size
