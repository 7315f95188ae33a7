"""Importance weights for tokens that another policy, or the same in another engine, sampled."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from fastppo.ops.losses.tokens import check_same, check_sequences, sequence_total, tokens

IMPORTANCE_MODES: Final = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@torch.no_grad()
def importance_weights(
    logprob: Tensor,
    sampler_logprob: Tensor,
    mask: Tensor | None = None,
    *,
    mode: str = "token_truncate",
    lower: float | None = None,
    upper: float | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    r"""Probability under the trainer's policy over that under the sampler, bounded; a constant.

        token:     rho_t = exp(logprob_t - sampler_logprob_t)
        sequence:  rho = product of rho_t over the sequence, for all its tokens
        truncate:  clip(rho, lower, upper)
        mask:      rho within [lower, upper], 0 outside

    Multiply the surrogate's loss by it. With old log-probs computed by the trainer, `logprob` is
    those, and the weight corrects the difference between the engines.

    Args:
        logprob: float (B, T) or packed (N,), log-probs by the trainer.
        sampler_logprob: the same shape, log-probs by the sampler.
        mask: the same shape, bool or numbers, of which 0 is outside; None is all tokens.
        mode: "token_truncate", "token_mask", "sequence_truncate" or "sequence_mask".
        lower, upper: >= 0 and > 0; None is no bound on that side, and one of them is needed.
        offsets: int (B+1,), where each sequence starts; needed by packed (N,) with sequence_*.

    Returns:
        A weight of each token, float32 (float64 where an input is), without gradient; 0 outside the
        mask, and 0 for a token of log-prob -inf.

    Raises:
        ValueError: an unknown mode, no bound, bounds out of order, shapes that disagree.
        TypeError: inputs that are not floating point.

    Source: Ionides 2008, Truncated Importance Sampling; Yao et al. 2025, Your Efficient RL
        Framework Secretly Brings You Off-Policy RL Training (token_truncate); Ling Team 2025, arXiv
        2510.18855 (IcePop: token_mask).
    """
    op = "importance_weights"
    if mode not in IMPORTANCE_MODES:
        raise ValueError(f"{op}: mode must be one of {', '.join(IMPORTANCE_MODES)}, came {mode!r}")
    low, high = 0.0 if lower is None else lower, math.inf if upper is None else upper
    if lower is None and upper is None:
        raise ValueError(f"{op}: one of lower and upper is needed, came neither")
    if not (low >= 0 and high > 0 and low <= high):
        raise ValueError(
            f"{op}: 0 <= lower <= upper must hold, with upper > 0; came {lower} and {upper}"
        )
    t = tokens(op, logprob, None, torch.zeros_like(logprob), mask, offsets)
    check_same(op, "sampler_logprob", sampler_logprob, logprob)
    possible = t.live & ~t.impossible
    log_ratio = t.logprob - torch.where(possible, sampler_logprob, 0).to(t.logprob.dtype)
    if mode.startswith("sequence"):
        check_sequences(op, logprob, offsets)
        impossible = sequence_total(t.impossible.to(log_ratio.dtype), offsets) > 0
        possible = t.live & ~impossible
        log_ratio = sequence_total(log_ratio, offsets)
    # Bounds on the logarithm: the product over a long sequence would overflow.
    log_low, log_high = -math.inf if low == 0 else math.log(low), math.log(high)
    weight = log_ratio.clamp(log_low, log_high).exp()
    if mode.endswith("mask"):
        weight = weight.masked_fill((log_ratio < log_low) | (log_ratio > log_high), 0)
    return torch.where(possible, weight, 0)
