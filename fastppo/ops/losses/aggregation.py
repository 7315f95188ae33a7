"""From losses of tokens to one number: the weight of each token."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fastppo.ops.arguments import check_device, show
from fastppo.ops.losses.tokens import check_form, check_same, check_sequences, sequence_total

AGGREGATIONS: Final = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
# TRL's loss_type -> the aggregation that it stands for.
_TRL: Final = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}


def weights(
    mask: Tensor,
    mode: str = "token-mean",
    denominator: float | Tensor | None = None,
    *,
    max_length: float | None = None,
    offsets: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""The weight of each token, with which a loss is the weighted sum over tokens.

        token-mean                1 / number of live tokens
        token-sum                 1
        seq-mean-token-mean       1 / (number of sequences * live tokens of the token's sequence)
        seq-mean-token-sum        1 / number of sequences
        seq-mean-token-sum-norm   1 / (number of sequences * max_length)

    Sequences without live tokens do not count. The denominator is that of a whole optimiser step:
    where a step is split into micro-batches or over devices, give its number of live tokens
    (token-mean) or sequences (seq-mean-*), and the parts add up.

    Args:
        mask: (B, T), bool or numbers, of which 0 is outside; or packed (N,).
        mode: one of the above, by verl's names; or TRL's loss_type: grpo is seq-mean-token-mean,
            bnpo and dapo are token-mean, dr_grpo is seq-mean-token-sum-norm.
        denominator: > 0, a number or 0-d tensor: the number of live tokens or of sequences; None is
            that of this batch. token-sum has none.
        max_length: > 0, needed by seq-mean-token-sum-norm: the longest response allowed.
        offsets: int (B+1,), where each sequence starts; needed by packed (N,) with seq-mean-*.
        dtype: of the weights.

    Returns:
        Weights of the mask's shape, without gradient; 0 outside the mask.

    Raises:
        ValueError: an unknown mode, a missing max_length or offsets, a denominator not above 0.

    Source: Yu et al. 2025, DAPO, arXiv 2503.14476 (token-mean); Liu et al. 2025, arXiv 2503.20783
        (division by a constant).
    """
    op = "weights"
    name = _TRL.get(mode, mode)
    if name not in AGGREGATIONS:
        raise ValueError(f"{op}: mode must be one of {', '.join(AGGREGATIONS)}, came {mode!r}")
    if not isinstance(mask, Tensor) or mask.ndim not in (1, 2):
        came = show(tuple(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{op}: mask must be (B, T) or packed (N,), came {came}")
    if (max_length is None) == (name == "seq-mean-token-sum-norm"):
        verb = "is needed by" if max_length is None else "has no meaning with"
        raise ValueError(f"{op}: max_length {verb} mode {mode!r}, came {max_length}")
    for what, value in (("denominator", denominator), ("max_length", max_length)):
        if isinstance(value, Tensor):
            check_device(op, what, value, mask)
        elif value is not None and not value > 0:
            raise ValueError(f"{op}: {what} must be > 0, came {value}")
    live = (mask != 0).to(dtype)
    if name == "token-sum":
        return live
    if name == "token-mean":
        return live / (live.sum().clamp(min=1) if denominator is None else denominator)
    check_sequences(op, mask, offsets)
    length = sequence_total(live, offsets).clamp(min=1)
    if denominator is None:
        if offsets is None:
            denominator = (live.sum(1) > 0).sum()
        else:
            ends = torch.cat([live.new_zeros(1), live.cumsum(0)])[offsets.long()]
            denominator = (ends.diff() > 0).sum()
        denominator = denominator.clamp(min=1)
    if name == "seq-mean-token-mean":
        return live / (length * denominator)
    return live / (denominator * (1.0 if max_length is None else max_length))


def aggregate(
    loss: Tensor,
    mask: Tensor | None = None,
    mode: str = "token-mean",
    denominator: float | Tensor | None = None,
    *,
    max_length: float | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """The loss of a batch: the sum over tokens of `weights` times loss, a differentiable scalar.

    Args:
        loss: float (B, T) or packed (N,); what stands outside the mask is not read.
        mask: the same shape; None is all tokens.
        mode, denominator, max_length, offsets: as in `weights`.

    Raises:
        ValueError: as `weights`, and shapes that disagree.
        TypeError: a loss that is not floating point.
    """
    op = "aggregate"
    check_form(op, loss, "loss")
    if mask is None:
        mask = torch.ones_like(loss, dtype=torch.bool)
    check_same(op, "mask", mask, loss, mask=True)
    weight = weights(
        mask, mode, denominator, max_length=max_length, offsets=offsets, dtype=loss.dtype
    )
    return (weight * torch.where(mask != 0, loss, 0)).sum()
