"""KL divergence to a reference, estimated from the sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops.arguments import stat_dtype
from fastppo.ops.config import check_positive, kl_kind_of
from fastppo.ops.losses.tokens import (
    check_form,
    check_same,
    check_sequences,
    clamp,
    importance_ratio,
    live_tokens,
    tokens,
)


def kl(
    logprob: Tensor,
    ref_logprob: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str = "k3",
    straight_through: bool = False,
    bias_correction: bool = False,
    old_logprob: Tensor | None = None,
    ratio_level: str = "token",
    offsets: Tensor | None = None,
    log_ratio_limit: float = 20.0,
    limit: float | None = None,
) -> Tensor:
    r"""KL from the policy to the reference at each sampled token, in nats.

        d = logprob - ref_logprob
        k1 = d,   abs = |d|,   k2 = d^2 / 2,   k3 = exp(-d) - 1 + d   with d clamped to +-limit

    As a loss, k1 and k3 do not have the gradient of the KL. Two corrections give it, for tokens
    that the policy itself sampled:

        straight_through:  the value of `kind`, the gradient of k2, which is d
        bias_correction:   k rho,   rho = exp(logprob - old_logprob), differentiated too

    Args:
        logprob: float (B, T) or packed (N,); differentiable. -inf (masked vocabulary) gives 0.
        ref_logprob: the same shape, log-probs under the reference; no gradient.
        mask: the same shape, bool or numbers, of which 0 is outside; None is all tokens.
        kind: "k1", "abs", "k2" or "k3"; verl's and TRL's names too: kl, mse, low_var_kl, and with a
            "+" at the end straight_through (k1+, k3+).
        straight_through: whether the gradient is k2's.
        bias_correction: whether the estimate is multiplied by the ratio (TRL's
            use_bias_correction_kl).
        old_logprob: the same shape, of that ratio; None is on-policy, where it is 1 and has a
            gradient all the same.
        ratio_level: "token"; "sequence" where the loss's ratio is (`gspo`; TRL's
            importance_sampling_level), or "sequence_token" (`gspo_token`).
        offsets: int (B+1,), where each sequence starts; needed with packed (N,) by the latter two.
        log_ratio_limit: > 0; k3 clamps d to +-this before exp, and the ratio's log too.
        limit: > 0, or None: the estimate is clamped to +-this, beyond which it has no gradient,
            except with straight_through (verl clamps k3 to 10, OpenRLHF all kinds).

    Returns:
        The KL of each token, float32 (float64 where an input is); 0 outside the mask.

    Raises:
        ValueError: an unknown kind, shapes that disagree, both corrections at once.
        TypeError: inputs that are not floating point.

    Source: Schulman 2020, Approximating KL Divergence; Liu et al. 2025, arXiv 2510.01555 (gradients
        of the estimators); DeepSeek-V3.2, arXiv 2512.02556, eq. 7 (bias correction).
    """
    op = "kl"
    if kind.endswith("+"):
        kind, straight_through = kind[:-1], True
    kind = kl_kind_of(op, kind)
    check_positive(op, "log_ratio_limit", log_ratio_limit)
    if limit is not None:
        check_positive(op, "limit", limit)
    if straight_through and bias_correction:
        raise ValueError(f"{op}: straight_through and bias_correction correct the same; keep one")
    if ratio_level not in ("token", "sequence", "sequence_token"):
        raise ValueError(
            f"{op}: ratio_level must be one of token, sequence, sequence_token, "
            f"came {ratio_level!r}"
        )
    if not bias_correction and (old_logprob is not None or ratio_level != "token"):
        name = "ratio_level" if old_logprob is None else "old_logprob"
        raise ValueError(f"{op}: {name} acts with bias_correction=True; leave it out")
    check_form(op, logprob)
    check_same(op, "ref_logprob", ref_logprob, logprob)
    live = live_tokens(op, logprob, mask)
    dtype = stat_dtype(logprob, ref_logprob)
    possible = live & (logprob.detach() != float("-inf"))
    filled = torch.where(possible, logprob, 0).to(dtype)
    d = filled - torch.where(possible, ref_logprob, 0).to(dtype).detach()
    k = estimate(d, kind, log_ratio_limit)
    if straight_through:
        gradient = estimate(d, "k2", log_ratio_limit)
        value = k.detach() if limit is None else k.detach().clamp(-limit, limit)
        return value + (gradient - gradient.detach())
    if bias_correction:
        if ratio_level != "token":
            check_sequences(op, logprob, offsets)
        t = tokens(op, logprob, old_logprob, torch.zeros_like(logprob), mask, offsets)
        k = k * importance_ratio(t, log_ratio_limit, ratio_level).ratio.to(dtype)
    return k if limit is None else clamp(k, -limit, limit)


def estimate(d: Tensor, kind: str, limit: float) -> Tensor:
    """The estimate of `kind` from the log ratio d of policy to reference."""
    if kind == "k1":
        return d
    if kind == "abs":
        return d.abs()
    if kind == "k2":
        return d.square() / 2
    e = clamp(-d, -limit, limit)
    return torch.expm1(e) - e


def kl_and_slope(
    logprob_N: Tensor, ref_logprob_N: Tensor, kind: str, limit: float
) -> tuple[Tensor, Tensor]:
    """k and dk/dlogprob; both 0 where the sampled token is masked vocabulary (logprob -inf)."""
    masked = logprob_N == float("-inf")
    d = torch.where(masked, 0, logprob_N - ref_logprob_N)
    if kind == "k1":
        slope = torch.ones_like(d)
    elif kind == "abs":
        slope = d.sign()
    elif kind == "k2":
        slope = d
    else:
        # By hand: autograd's 1 - exp(-d) has lost the digits of a small d.
        slope = torch.where(d.abs() <= limit, -torch.expm1((-d).clamp(-limit, limit)), 0)
    return estimate(d, kind, limit), slope.masked_fill(masked, 0)
