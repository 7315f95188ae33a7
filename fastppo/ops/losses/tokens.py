"""A batch of tokens as the losses take it: checks, sums over sequences, the importance ratio."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops.arguments import stat_dtype
from fastppo.ops.checks import check_floating, check_offsets, check_vector, show


class Tokens(NamedTuple):
    """A batch after its checks, float32 or float64; 0 where a token takes no part."""

    logprob: Tensor  # differentiable
    old_logprob: Tensor
    advantage: Tensor
    live: Tensor  # bool: in the mask
    impossible: Tensor  # bool: live, but of log-prob -inf, as masked vocabulary is
    offsets: Tensor | None


class Ratio(NamedTuple):
    """Importance ratio of each token, and what it was made of."""

    ratio: Tensor  # 0 where the token, or one of its sequence, is impossible
    log_ratio: Tensor  # of each token itself, not clamped; 0 where impossible
    clamped: Tensor  # bool: the log ratio was beyond the limit


class TokenLoss(NamedTuple):
    """A loss of each token, in units of the advantage; all of the log-probs' shape.

    `loss` is differentiable in the log-probs and 0 outside the mask; the others are bool.
    """

    loss: Tensor
    clipped_low: Tensor  # the lower clip acted
    clipped_high: Tensor  # the upper clip acted
    dual_clipped: Tensor  # the bound on large ratios acted (dual_clip; dppo's ratio_limit)


def check_form(op: str, logprob: Tensor, name: str = "logprob") -> None:
    """Check that log-probs are floats, padded or packed."""
    check_floating(op, name, logprob)
    if logprob.ndim not in (1, 2):
        raise ValueError(
            f"{op}: {name} must be (B, T) with a mask or packed (N,), "
            f"came {show(tuple(logprob.shape))}"
        )


def check_same(op: str, name: str, x: Tensor, like: Tensor, *, mask: bool = False) -> None:
    """Check that `x` has the shape and device of the log-probs, and holds floats unless a mask."""
    check_vector(op, name, x, like, n=like.shape, mask=mask)


def check_sequences(op: str, like: Tensor, offsets: Tensor | None) -> None:
    """Check that it is known where sequences start: by the rows of (B, T), or by offsets."""
    if like.ndim == 2 and offsets is not None:
        raise ValueError(f"{op}: offsets belong to packed (N,) tensors; leave them out with (B, T)")
    if like.ndim == 1 and offsets is None:
        raise ValueError(f"{op}: offsets are needed with packed (N,) tensors, came None")
    if offsets is not None:
        check_offsets(op, offsets, like, n=like.numel())


def live_tokens(op: str, like: Tensor, mask: Tensor | None) -> Tensor:
    """The mask as bool; all True without one."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    check_same(op, "mask", mask, like, mask=True)
    return mask != 0


def advantage_of_tokens(op: str, advantage: Tensor, like: Tensor) -> Tensor:
    """Advantages of the shape of `like`; one for each sequence is that of all its tokens."""
    if isinstance(advantage, Tensor) and like.ndim == 2:
        rows = like.shape[0]
        if advantage.shape in ((rows,), (rows, 1)) and like.shape != (rows, 1):
            advantage = advantage.reshape(rows, 1).expand_as(like)
    check_same(op, "advantage", advantage, like)
    return advantage


def tokens(
    op: str,
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None = None,
) -> Tokens:
    """Check a loss's tensors; without old log-probs those are the log-probs, detached."""
    check_form(op, logprob)
    live = live_tokens(op, logprob, mask)
    advantage = advantage_of_tokens(op, advantage, logprob)
    dtype = stat_dtype(logprob, advantage)
    if old_logprob is not None:
        check_same(op, "old_logprob", old_logprob, logprob)
        dtype = stat_dtype(logprob, advantage, old_logprob)
    impossible = live & (logprob.detach() == float("-inf"))
    possible = live & ~impossible
    # where before the arithmetic: 0 times a NaN in a gradient is NaN.
    filled = torch.where(possible, logprob, 0).to(dtype)
    old = filled if old_logprob is None else torch.where(possible, old_logprob, 0).to(dtype)
    advantage = torch.where(live, advantage, 0).to(dtype).detach()
    return Tokens(filled, old.detach(), advantage, live, impossible, offsets)


def sequence_index(offsets: Tensor, n: int) -> Tensor:
    """Index of each token's sequence, int64 (N,); the host does not wait for the device."""
    at = torch.arange(n, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), at, right=True)


def sequence_total(x: Tensor, offsets: Tensor | None) -> Tensor:
    """For each token, the sum over its sequence, in a fixed order."""
    if offsets is None:
        return x.sum(1, keepdim=True).expand_as(x)
    total_B = torch.segment_reduce(
        x, "sum", offsets=offsets.long(), axis=0, initial=0.0, unsafe=True
    )
    return total_B[sequence_index(offsets, x.numel())]


def sequence_mean(x: Tensor, live: Tensor, offsets: Tensor | None) -> Tensor:
    """For each token, the mean over the live tokens of its sequence."""
    total = sequence_total(x.masked_fill(~live, 0), offsets)
    return total / sequence_total(live.to(x.dtype), offsets).clamp(min=1)


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """x between the bounds, with its whole gradient at a bound itself.

    The kernels have it so, and torch.clamp up to torch 2.13; from 2.14 on that has none there.
    """
    return torch.where(x < low, low, torch.where(x > high, high, x))


def importance_ratio(t: Tokens, limit: float, level: str = "token") -> Ratio:
    """exp of the log ratio, clamped to +-limit, at one of three levels.

    token: of each token. sequence: exp of the mean over the sequence, whose gradient goes to all
    its tokens. sequence_token: the same value, whose gradient goes to the token alone.
    """
    log_ratio = t.logprob - t.old_logprob
    used, impossible = log_ratio, t.impossible
    if level != "token":
        used = sequence_mean(log_ratio, t.live, t.offsets)
        impossible = sequence_total(impossible.to(used.dtype), t.offsets) > 0
    if level == "sequence_token":
        used = used.detach() + (t.logprob - t.logprob.detach())
    clamped = ((used > limit) | (used < -limit)) & t.live & ~impossible
    ratio = torch.where(impossible, 0, clamp(used, -limit, limit).exp())
    return Ratio(ratio, log_ratio, clamped)


def of_live(
    t: Tokens,
    loss: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
    dual: Tensor | None = None,
) -> TokenLoss:
    """The loss of the live tokens, and which of them were clipped."""
    none = torch.zeros_like(t.live)
    flags = (none.clone() if flag is None else flag & t.live for flag in (low, high, dual))
    return TokenLoss(torch.where(t.live, loss, 0), *flags)
