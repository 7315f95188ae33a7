"""REINFORCE, and losses that weigh its tokens by the ratio in place of PPO's clip."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops.config import check_clip, check_positive
from fastppo.ops.losses.tokens import TokenLoss, importance_ratio, of_live, tokens

_LEAST = 1e-8  # of 1 - p in a binary KL


def cispo(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    log_ratio_limit: float = 20.0,
) -> TokenLoss:
    r"""REINFORCE with the clipped ratio as a constant weight: no token loses its gradient.

        L = -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A logprob,    sg without gradient

    Args:
        logprob, old_logprob, advantage, mask, log_ratio_limit: as in `ppo_clip`; a log-prob of -inf
            has loss 0.
        clip_low, clip_high: >= 0; clip_low=1 is no lower bound. TRL's epsilon_high bounds the ratio
            itself: its 5.0 is clip_high=4.0 with clip_low=1.0.

    Returns:
        TokenLoss; a token counts as clipped if its ratio was outside the clip.

    Raises:
        ValueError: shapes that disagree, a setting out of range.
        TypeError: inputs that are not floating point.

    Source: MiniMax 2025, MiniMax-M1, arXiv 2506.13585, eq. 4 and 5.
    """
    op = "cispo"
    check_clip(op, clip_low, clip_high)
    check_positive(op, "log_ratio_limit", log_ratio_limit)
    t = tokens(op, logprob, old_logprob, advantage, mask)
    ratio = importance_ratio(t, log_ratio_limit).ratio.detach()
    low, high = 1 - clip_low, 1 + clip_high
    loss = -ratio.clamp(low, high) * t.advantage * t.logprob
    return of_live(t, loss, ratio < low, ratio > high)


def sapo(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    log_ratio_limit: float = 20.0,
) -> TokenLoss:
    r"""A soft gate in place of the clip, whose slope is 1 at ratio 1 and falls away on both sides.

        L = -A (4 / tau) sigmoid(tau (rho - 1)),    tau = tau_pos where A > 0, else tau_neg

    Args:
        logprob, old_logprob, advantage, mask, log_ratio_limit: as in `ppo_clip`.
        tau_pos, tau_neg: > 0; a larger one is a narrower gate.

    Returns:
        TokenLoss; no token counts as clipped.

    Raises:
        ValueError: shapes that disagree, a setting out of range.
        TypeError: inputs that are not floating point.

    Source: Gao et al. 2025, Soft Adaptive Policy Optimization, arXiv 2511.20347.
    """
    op = "sapo"
    check_positive(op, "tau_pos", tau_pos)
    check_positive(op, "tau_neg", tau_neg)
    check_positive(op, "log_ratio_limit", log_ratio_limit)
    t = tokens(op, logprob, old_logprob, advantage, mask)
    ratio = importance_ratio(t, log_ratio_limit).ratio
    # full_like: torch.where of two numbers is float32, whatever the ratio is.
    tau = torch.where(t.advantage > 0, torch.full_like(ratio, tau_pos), tau_neg)
    return of_live(t, -t.advantage * torch.sigmoid(tau * (ratio - 1)) * 4 / tau)


def dppo(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: str = "tv",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_limit: float = 20.0,
    log_ratio_limit: float = 20.0,
) -> TokenLoss:
    r"""REINFORCE within a trust region of probabilities: ratios of rare tokens may be large.

        L = -sg(min(rho, ratio_limit)) A logprob  within the region, 0 outside it

    A token is outside if its advantage drives it further from the old policy, and the divergence is
    already above clip_high (A > 0, probability above the old one) or clip_low (A < 0, below):

        tv: |p - p_old|
        kl: KL of the binary distributions (p_old, 1 - p_old) to (p, 1 - p)

    Args:
        logprob, old_logprob, advantage, mask, log_ratio_limit: as in `ppo_clip`; a log-prob of -inf
            has loss 0.
        divergence: "tv" or "kl" (verl's dppo_tv and dppo_kl).
        clip_low, clip_high: >= 0, largest divergence; of tv at most 1 makes a difference.
        ratio_limit: > 0; larger ratios weigh as much (verl's clip_ratio_c).

    Returns:
        TokenLoss; clipped tokens are outside the region, and dual_clipped says where ratio_limit
        acted within it.

    Raises:
        ValueError: shapes that disagree, a setting out of range.
        TypeError: inputs that are not floating point.

    Source: Divergence Proximal Policy Optimization, 2026, arXiv 2602.04879.
    """
    op = "dppo"
    if divergence not in ("tv", "kl"):
        raise ValueError(f"{op}: divergence must be one of tv, kl, came {divergence!r}")
    check_clip(op, clip_low, clip_high)
    check_positive(op, "ratio_limit", ratio_limit)
    check_positive(op, "log_ratio_limit", log_ratio_limit)
    t = tokens(op, logprob, old_logprob, advantage, mask)
    ratio = importance_ratio(t, log_ratio_limit).ratio.detach()
    new, old = t.logprob.detach().exp(), t.old_logprob.exp()
    if divergence == "tv":
        distance = (new - old).abs()
    else:
        rest, old_rest = (1 - new).clamp(min=_LEAST), (1 - old).clamp(min=_LEAST)
        distance = old * (t.old_logprob - t.logprob.detach()) + old_rest * (old_rest / rest).log()
    high = (t.advantage > 0) & (new > old) & (distance > clip_high)
    low = (t.advantage < 0) & (new < old) & (distance > clip_low)
    weight = ratio.clamp(max=ratio_limit).masked_fill(high | low, 0)
    loss = -weight * t.advantage * t.logprob
    return of_live(t, loss, low, high, (ratio > ratio_limit) & ~high & ~low)


def reinforce(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor | None = None,
) -> TokenLoss:
    r"""The policy gradient itself, without ratio or clip: L = -A logprob.

    verl calls it "gpg". Off-policy data are corrected by `importance_weights`, as a factor.

    Args:
        logprob, advantage, mask: as in `ppo_clip`; a log-prob of -inf has loss 0.
        old_logprob: has no effect; None or the log-probs' shape.

    Returns:
        TokenLoss; no token counts as clipped.

    Raises:
        ValueError: shapes that disagree.
        TypeError: inputs that are not floating point.

    Source: Williams 1992, Simple Statistical Gradient-Following Algorithms for Connectionist
        Reinforcement Learning.
    """
    t = tokens("reinforce", logprob, old_logprob, advantage, mask)
    return of_live(t, -t.advantage * t.logprob)


def dro(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float,
) -> TokenLoss:
    r"""The policy gradient with a quadratic penalty on the log ratio, and no ratio or clip.

        L = -A logprob + beta / 2 (logprob - old_logprob)^2

    Args:
        logprob, old_logprob, advantage, mask: as in `ppo_clip`; a log-prob of -inf has loss 0.
        beta: > 0, weight of the penalty (verl's dro_beta).

    Returns:
        TokenLoss; no token counts as clipped.

    Raises:
        ValueError: shapes that disagree, beta not above 0.
        TypeError: inputs that are not floating point.

    Source: Richemond et al. 2024, Offline Regularised Reinforcement Learning for Large Language
        Models Alignment, arXiv 2405.19107.
    """
    op = "dro"
    check_positive(op, "beta", beta)
    t = tokens(op, logprob, old_logprob, advantage, mask)
    penalty = (t.logprob - t.old_logprob).square() * (beta / 2)
    return of_live(t, penalty - t.advantage * t.logprob)
