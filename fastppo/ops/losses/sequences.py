"""Losses whose tokens share one weight of their sequence, other than `gspo`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastppo.ops.config import check_clip, check_positive
from fastppo.ops.losses.tokens import (
    TokenLoss,
    check_sequences,
    clamp,
    of_live,
    sequence_mean,
    sequence_total,
    tokens,
)

_LOG_LEAST = math.log(1e-8)  # of a sequence's ratio in VESPO
_LOG_MOST = 20.0


def geo_mean(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
    log_ratio_limit: float = 20.0,
) -> TokenLoss:
    r"""GMPO: the geometric mean of a sequence's ratios, each clipped in its logarithm.

        d = logprob - old_logprob
        e = min(d, clip_high) where A > 0,   max(d, -clip_low) where A < 0
        L = -A exp(mean of e over the sequence)

    Use `aggregate` with "seq-mean-token-mean". verl calls it "geo_mean".

    Args:
        logprob, old_logprob, advantage, mask, log_ratio_limit: as in `ppo_clip`. A sequence with a
            log-prob of -inf has ratio 0 and no gradient.
        offsets: int (B+1,), where each sequence starts; needed with packed (N,).
        clip_low, clip_high: >= 0, bounds of log ratios; the published 0.4 is wider than PPO's.

    Returns:
        TokenLoss; a token counts as clipped if the clip took its gradient.

    Raises:
        ValueError: shapes that disagree, a setting out of range, packed tensors without offsets.
        TypeError: inputs that are not floating point.

    Source: Zhao et al. 2025, Geometric-Mean Policy Optimization, arXiv 2507.20673.
    """
    op = "geo_mean"
    check_clip(op, clip_low, clip_high)
    check_positive(op, "log_ratio_limit", log_ratio_limit)
    t = tokens(op, logprob, old_logprob, advantage, mask, offsets)
    check_sequences(op, logprob, offsets)
    d = clamp(t.logprob - t.old_logprob, -log_ratio_limit, log_ratio_limit)
    positive, negative = t.advantage > 0, t.advantage < 0
    held = torch.where(positive, clamp(d, -math.inf, clip_high), torch.where(negative, d, 0))
    held = torch.where(negative, clamp(held, -clip_low, math.inf), held)
    impossible = sequence_total(t.impossible.to(d.dtype), offsets) > 0
    ratio = torch.where(impossible, 0, sequence_mean(held, t.live, offsets).exp())
    low, high = negative & (d < -clip_low), positive & (d > clip_high)
    return of_live(t, -t.advantage * ratio, low, high)


def vespo(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    log_ratio_limit: float = 20.0,
) -> TokenLoss:
    r"""VESPO: REINFORCE with a smooth weight of the sequence's whole ratio, which is 1 at ratio 1.

        w   = product over the sequence of exp(clamp(logprob - old_logprob, +-log_ratio_limit))
        phi = w^k exp(lambda (1 - w)),    k, lambda = k_pos, lambda_pos where A >= 0
        L   = -sg(phi) A logprob,    sg without gradient

    Where another engine sampled, give its log-probs as old_logprob: the correction belongs in w.

    Args:
        logprob, old_logprob, advantage, mask, log_ratio_limit: as in `ppo_clip`. A sequence with a
            log-prob of -inf has loss 0.
        offsets: int (B+1,), where each sequence starts; needed with packed (N,).
        k_pos, k_neg: > 0, how fast the weight falls with a small ratio.
        lambda_pos, lambda_neg: > 0, how fast it falls with a large one.

    Returns:
        TokenLoss; no token counts as clipped.

    Raises:
        ValueError: shapes that disagree, a setting out of range, packed tensors without offsets.
        TypeError: inputs that are not floating point.

    Source: VESPO: Variational Sequence-Level Soft Policy Optimization, 2026, arXiv 2602.10693.
    """
    op = "vespo"
    for name, value in (
        ("k_pos", k_pos),
        ("lambda_pos", lambda_pos),
        ("k_neg", k_neg),
        ("lambda_neg", lambda_neg),
        ("log_ratio_limit", log_ratio_limit),
    ):
        check_positive(op, name, value)
    t = tokens(op, logprob, old_logprob, advantage, mask, offsets)
    check_sequences(op, logprob, offsets)
    d = (t.logprob.detach() - t.old_logprob).clamp(-log_ratio_limit, log_ratio_limit)
    log_w = sequence_total(d.masked_fill(~t.live, 0), offsets).clamp(_LOG_LEAST, _LOG_MOST)
    kept = t.advantage >= 0
    # full_like: torch.where of two numbers is float32, whatever the ratio is.
    k = torch.where(kept, torch.full_like(log_w, k_pos), k_neg)
    lam = torch.where(kept, torch.full_like(log_w, lambda_pos), lambda_neg)
    phi = (k * log_w + lam * (1 - log_w.exp())).exp()
    phi = phi.masked_fill(sequence_total(t.impossible.to(d.dtype), offsets) > 0, 0)
    return of_live(t, -phi * t.advantage * t.logprob)
