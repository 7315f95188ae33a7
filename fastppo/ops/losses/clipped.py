"""PPO's clipped surrogate, with a ratio of each token or of each sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops.config import check_clip, check_positive
from fastppo.ops.losses.tokens import (
    TokenLoss,
    Tokens,
    check_sequences,
    clamp,
    importance_ratio,
    of_live,
    tokens,
)


def ppo_clip(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_limit: float = 20.0,
) -> TokenLoss:
    r"""PPO's clipped surrogate of each token, in units of the advantage.

        rho = exp(clamp(logprob - old_logprob, +-log_ratio_limit))
        L   = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))
        L   = min(L, -dual_clip A)  where A < 0

    verl calls it "vanilla"; TRL's "grpo", "dapo", "bnpo" and "dr_grpo" are the same loss of a token
    and differ in `aggregate` alone.

    Args:
        logprob: float (B, T) or packed (N,), log-prob of each sampled token; differentiable. -inf
            (masked vocabulary) has ratio 0 and no gradient.
        old_logprob: the same shape, log-probs under the policy that sampled. None is on-policy: the
            log-probs themselves, detached, so that every ratio is 1.
        advantage: the same shape; with (B, T) also (B,) or (B, 1), one for each sequence.
        mask: the same shape, bool or numbers, of which 0 is outside; None is all tokens.
        clip_low, clip_high: >= 0; the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: > 1 + clip_high: where A < 0 the loss is at most this times |A|; None is no
            bound.
        log_ratio_limit: > 0; beyond it there is no gradient.

    Returns:
        TokenLoss, float32 (float64 where an input is). A token counts as clipped if the clip took
        its gradient.

    Raises:
        ValueError: shapes that disagree, a setting out of range.
        TypeError: inputs that are not floating point.

    Source: Schulman et al. 2017, Proximal Policy Optimization Algorithms, eq. 7; Ye et al. 2020,
        arXiv 1912.09729 (dual clip); Yu et al. 2025, arXiv 2503.14476 (a higher upper clip).
    """
    op = "ppo_clip"
    check_clip(op, clip_low, clip_high, dual_clip)
    check_positive(op, "log_ratio_limit", log_ratio_limit)
    t = tokens(op, logprob, old_logprob, advantage, mask)
    return _clipped(t, importance_ratio(t, log_ratio_limit).ratio, clip_low, clip_high, dual_clip)


def dr_grpo(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_limit: float = 20.0,
) -> TokenLoss:
    """Dr. GRPO's loss of each token, which is `ppo_clip`.

    What makes it Dr. GRPO stands elsewhere: advantages that are not divided by a standard deviation
    (`group_advantages(kind="dr_grpo")`), and a sum over tokens that is divided by a constant
    (`aggregate(mode="seq-mean-token-sum-norm", max_length=...)`).

    Args:
        logprob, old_logprob, advantage, mask, clip_low, clip_high, dual_clip, log_ratio_limit: as
            in `ppo_clip`.

    Returns:
        TokenLoss, as `ppo_clip`.

    Raises:
        ValueError, TypeError: as `ppo_clip`.

    Source: Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv 2503.20783.
    """
    return ppo_clip(
        logprob,
        old_logprob,
        advantage,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        log_ratio_limit=log_ratio_limit,
    )


def gspo(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_limit: float = 20.0,
) -> TokenLoss:
    r"""`ppo_clip` with one ratio for each sequence, whose gradient all its tokens share.

        s = exp(clamp(mean over the sequence of (logprob - old_logprob), +-log_ratio_limit))

    TRL and OpenRLHF have it so. Where the tokens of a sequence differ in advantage or weight, each
    one's loss moves all tokens alike; `gspo_token` keeps them apart. The published clips are far
    smaller than PPO's: 3e-4 below and 4e-4 above.

    Args:
        logprob, old_logprob, advantage, mask, clip_low, clip_high, dual_clip, log_ratio_limit: as
            in `ppo_clip`. A sequence with a log-prob of -inf has ratio 0 and no gradient.
        offsets: int (B+1,), where each sequence starts; needed with packed (N,).

    Returns:
        TokenLoss, as `ppo_clip`.

    Raises:
        ValueError: shapes that disagree, a setting out of range, packed tensors without offsets.
        TypeError: inputs that are not floating point.

    Source: Zheng et al. 2025, Group Sequence Policy Optimization, arXiv 2507.18071, eq. 5 and 7.
    """
    op = "gspo"
    return _by_sequence(
        op,
        "sequence",
        (logprob, old_logprob, advantage, mask, offsets),
        (clip_low, clip_high, dual_clip),
        log_ratio_limit,
    )


def gspo_token(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_limit: float = 20.0,
) -> TokenLoss:
    r"""`gspo` for advantages by token (a critic's): each token has its own gradient.

        s_t = sg(s) pi(t) / sg(pi(t)),    s the sequence's ratio, sg without gradient

    The ratio has the value of `gspo`'s; the gradient of a token's loss goes to that token alone.
    With one advantage and one weight for all tokens of a sequence both have the same gradient. It
    is what verl calls "gspo".

    Args:
        logprob, old_logprob, advantage, mask, offsets, clip_low, clip_high, dual_clip,
            log_ratio_limit: as in `gspo`.

    Returns:
        TokenLoss, as `ppo_clip`.

    Raises:
        ValueError: shapes that disagree, a setting out of range, packed tensors without offsets.
        TypeError: inputs that are not floating point.

    Source: Zheng et al. 2025, Group Sequence Policy Optimization, arXiv 2507.18071, section 4.3.
    """
    op = "gspo_token"
    return _by_sequence(
        op,
        "sequence_token",
        (logprob, old_logprob, advantage, mask, offsets),
        (clip_low, clip_high, dual_clip),
        log_ratio_limit,
    )


def _by_sequence(
    op: str,
    level: str,
    given: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None],
    clips: tuple[float, float, float | None],
    log_ratio_limit: float,
) -> TokenLoss:
    check_clip(op, *clips)
    check_positive(op, "log_ratio_limit", log_ratio_limit)
    t = tokens(op, *given)
    check_sequences(op, given[0], t.offsets)
    return _clipped(t, importance_ratio(t, log_ratio_limit, level).ratio, *clips)


def _clipped(
    t: Tokens, ratio: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> TokenLoss:
    low, high = 1 - clip_low, 1 + clip_high
    loss = torch.maximum(-t.advantage * ratio, -t.advantage * clamp(ratio, low, high))
    negative, dual = t.advantage < 0, None
    if dual_clip is not None:
        bound = -dual_clip * t.advantage
        loss = torch.where(negative & (loss > bound), bound, loss)
        dual = negative & (ratio > dual_clip)
    return of_live(t, loss, negative & (ratio < low), (t.advantage > 0) & (ratio > high), dual)
