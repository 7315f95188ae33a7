"""The critic's loss, token by token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops.arguments import stat_dtype
from fastppo.ops.config import check_positive
from fastppo.ops.losses.tokens import check_form, check_same, live_tokens


class TokenValueLoss(NamedTuple):
    """A loss of each token, differentiable in the values, and where the clip took its gradient."""

    loss: Tensor
    clipped: Tensor


def value_loss(
    value: Tensor,
    old_value: Tensor | None,
    return_: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
) -> TokenValueLoss:
    r"""Half the squared error of each value, with or without clip: the larger.

        1/2 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)

    `fastppo.ops.value_loss` is its weighted sum over packed tokens, in one launch.

    Args:
        value: float (B, T) or packed (N,), V of the state before each token; differentiable.
        old_value: the same shape, the values at rollout; None only where clip is None.
        return_: the same shape.
        mask: the same shape, bool or numbers, of which 0 is outside; None is all tokens.
        clip: c > 0, in the reward's units; None is the plain squared error.

    Returns:
        TokenValueLoss(loss, clipped), the loss in squared units of the reward.

    Raises:
        ValueError: shapes that disagree, clip not above 0, clip without old values.
        TypeError: inputs that are not floating point.

    Source: Huang et al. 2022, The 37 Implementation Details of PPO, detail 9.
    """
    op = "value_loss"
    check_form(op, value, "value")
    check_same(op, "return_", return_, value)
    live, dtype = live_tokens(op, value, mask), stat_dtype(value, return_)
    v, target = (torch.where(live, x, 0).to(dtype) for x in (value, return_.detach()))
    error = (v - target).square()
    if clip is None:
        return TokenValueLoss(error / 2, torch.zeros_like(live))
    check_positive(op, "clip", clip)
    if old_value is None:
        raise ValueError(f"{op}: old_value is needed where clip is not None, came None")
    check_same(op, "old_value", old_value, value)
    old = torch.where(live, old_value.detach(), 0).to(dtype)
    held = (torch.minimum(torch.maximum(v, old - clip), old + clip) - target).square()
    clipped = live & (held > error)
    # Where the clipped error is the larger, the value was clipped: no gradient.
    return TokenValueLoss(torch.where(clipped, held, error) / 2, clipped)
