"""The per-token loss of PPO as two scalars, g = dL/dlogprob and h = dL/dentropy.

Everything here costs a few operations a token; the vocabulary is never seen. A new loss is written
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops.config import PolicyLossConfig
from fastppo.ops.token_kl import kl_and_slope


class PolicyMetrics(NamedTuple):
    """Sums over the live tokens of a batch, 0-d tensors: add with `merge`, divide at the end.

    `count` is the number of live tokens; the `*_sum` fields divide by it. The last three carry
    their weights already: they add up to the loss.
    """

    count: Tensor  # type: ignore[assignment]  # tuple's own count() gives way
    ratio_sum: Tensor  # of the ratio that the loss used
    ratio_max: Tensor  # a maximum, not a sum; 0 without live tokens
    log_ratio_abs_sum: Tensor  # |logprob - behaviour_logprob|, clamped: 0 on the behaviour policy
    clipped_sum: Tensor  # tokens whose gradient the clip (or the dual clip) cut
    clamped_sum: Tensor  # tokens whose log ratio met log_ratio_limit
    approx_kl_sum: Tensor  # k3 of behaviour to policy: ratio - 1 - log ratio, >= 0
    policy_kl_sum: Tensor  # behaviour_logprob - logprob, clamped; TRL's policykl
    entropy_sum: Tensor
    kl_sum: Tensor  # policy to reference, of the loss's kind; 0 without a reference
    surrogate: Tensor  # sum of weight * importance weight * clipped loss
    kl_loss: Tensor  # sum of weight * kl_coef * kl
    entropy_loss: Tensor  # minus the sum of weight * entropy_coef * entropy

    def merge(self, other: PolicyMetrics) -> PolicyMetrics:
        """Metrics of two batches together."""
        added = PolicyMetrics(*(a + b for a, b in zip(self, other, strict=True)))
        return added._replace(ratio_max=torch.maximum(self.ratio_max, other.ratio_max))


@dataclass(frozen=True)
class PolicyInputs:
    """What a token's loss depends on besides its logits; finite filler on rows not live."""

    behaviour_logprob_N: Tensor
    advantage_N: Tensor
    weight_N: Tensor
    live_N: Tensor
    ref_logprob_N: Tensor | None
    importance_weight_N: Tensor | None
    kl_coef: float | Tensor
    entropy_coef: float | Tensor
    config: PolicyLossConfig
    offsets: Tensor | None = None

    @property
    def by_sequence(self) -> bool:
        return self.config.ratio_level == "sequence"

    @property
    def has_kl(self) -> bool:
        return self.ref_logprob_N is not None and not _is_zero(self.kl_coef)

    @property
    def has_entropy(self) -> bool:
        return not _is_zero(self.entropy_coef)

    def at(self, rows: slice) -> PolicyInputs:
        """The inputs of some rows; only where a token's loss is its own."""
        assert not self.by_sequence
        ref, importance = self.ref_logprob_N, self.importance_weight_N
        return PolicyInputs(
            self.behaviour_logprob_N[rows],
            self.advantage_N[rows],
            self.weight_N[rows],
            self.live_N[rows],
            None if ref is None else ref[rows],
            None if importance is None else importance[rows],
            self.kl_coef,
            self.entropy_coef,
            self.config,
        )


class _Surrogate(NamedTuple):
    loss: Tensor  # u L
    slope: Tensor  # d(u L)/d(log ratio), 0 where clipped, clamped, masked or not live
    ratio: Tensor
    log_ratio: Tensor  # of the token, clamped
    clipped: Tensor
    clamped: Tensor


def sequence_index(offsets: Tensor, n: int) -> Tensor:
    """int64 (N,), the sequence of each token; without asking the device for a value."""
    at = torch.arange(n, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), at, right=True)


def _segment_sum(x_N: Tensor, offsets: Tensor) -> Tensor:
    """Sums by sequence, (B,), in a fixed order."""
    return torch.segment_reduce(
        x_N, "sum", offsets=offsets.long(), axis=0, initial=0.0, unsafe=True
    )


def _sequence_mean(x_N: Tensor, inputs: PolicyInputs) -> Tensor:
    """The mean over each sequence's live tokens, given back to each of its tokens."""
    assert inputs.offsets is not None
    total_B = _segment_sum(x_N.masked_fill(~inputs.live_N, 0), inputs.offsets)
    count_B = _segment_sum(inputs.live_N.to(x_N.dtype), inputs.offsets)
    return (total_B / count_B.clamp(min=1))[sequence_index(inputs.offsets, x_N.numel())]


def _surrogate(inputs: PolicyInputs, logprob_N: Tensor) -> _Surrogate:
    config, limit = inputs.config, inputs.config.log_ratio_limit
    low, high = 1 - config.clip_low, 1 + config.clip_high
    # A sampled token of masked vocabulary has ratio 0, whatever the clamp would make of it.
    masked = logprob_N == float("-inf")
    raw = torch.where(masked, -limit, logprob_N - inputs.behaviour_logprob_N)
    raw = raw.masked_fill(~inputs.live_N, 0)
    log_ratio = raw.clamp(-limit, limit)
    used = raw
    if inputs.by_sequence:
        used = _sequence_mean(raw.masked_fill(masked, float("-inf")), inputs)
        masked = used == float("-inf")
    clamped = ((used > limit) | (used < -limit)) & inputs.live_N & ~masked
    ratio = used.clamp(-limit, limit).exp().masked_fill(masked, 0)

    advantage = inputs.advantage_N
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
    clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    if config.dual_clip is not None:
        bound = -config.dual_clip * advantage
        loss = torch.where((advantage < 0) & (loss > bound), bound, loss)
        clipped = clipped | ((advantage < 0) & (ratio > config.dual_clip))
    slope = (-advantage * ratio).masked_fill(clipped | clamped | masked | ~inputs.live_N, 0)
    if inputs.importance_weight_N is not None:
        loss, slope = loss * inputs.importance_weight_N, slope * inputs.importance_weight_N
    return _Surrogate(loss, slope, ratio, log_ratio, clipped & inputs.live_N, clamped)


def token_gradient(inputs: PolicyInputs, logprob_N: Tensor) -> tuple[Tensor, Tensor | None]:
    """g and h of each token; h is None where the entropy has no weight."""
    slope = _surrogate(inputs, logprob_N).slope
    g = inputs.weight_N * slope
    if inputs.by_sequence:
        # Each token moves its sequence's ratio by 1 / length, and so the loss of all its tokens.
        g = _sequence_mean(g, inputs)
    if inputs.has_kl:
        assert inputs.ref_logprob_N is not None
        config = inputs.config
        _, kl_slope = kl_and_slope(
            logprob_N, inputs.ref_logprob_N, config.kl_kind, config.log_ratio_limit
        )
        g = g + inputs.weight_N * inputs.kl_coef * kl_slope
    h = None
    if inputs.has_entropy:
        # The row of a masked sample takes no part in the loss, so its entropy passes no gradient.
        h = (-inputs.weight_N * inputs.entropy_coef).masked_fill(logprob_N == float("-inf"), 0)
    return g, h


def totals(
    inputs: PolicyInputs, logprob_N: Tensor, entropy_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KL of each token (0 without a reference) and the vector of metrics."""
    live, weight = inputs.live_N, inputs.weight_N
    terms = _surrogate(inputs, logprob_N)
    zero = logprob_N.new_zeros(())

    def total(x: Tensor) -> Tensor:
        return x.masked_fill(~live, 0).sum()

    surrogate = total(weight * terms.loss)
    kl_loss = entropy_loss = kl_sum = zero
    kl = torch.zeros_like(logprob_N)
    if inputs.ref_logprob_N is not None:
        config = inputs.config
        kl, _ = kl_and_slope(
            logprob_N, inputs.ref_logprob_N, config.kl_kind, config.log_ratio_limit
        )
        kl = kl.masked_fill(~live, 0)
        kl_sum = kl.sum()
        if inputs.has_kl:
            kl_loss = total(weight * inputs.kl_coef * kl)
    if inputs.has_entropy:
        masked = logprob_N == float("-inf")
        entropy_loss = -total((weight * inputs.entropy_coef * entropy_N).masked_fill(masked, 0))
    ratio = terms.ratio.masked_fill(~live, 0)
    metrics = PolicyMetrics(
        count=live.sum(),
        ratio_sum=ratio.sum(),
        ratio_max=ratio.amax() if ratio.numel() else zero,
        log_ratio_abs_sum=total(terms.log_ratio.abs()),
        clipped_sum=terms.clipped.sum(),
        clamped_sum=terms.clamped.sum(),
        approx_kl_sum=total(torch.expm1(terms.log_ratio) - terms.log_ratio),
        policy_kl_sum=-total(terms.log_ratio),
        entropy_sum=total(entropy_N),
        kl_sum=kl_sum,
        surrogate=surrogate,
        kl_loss=kl_loss,
        entropy_loss=entropy_loss,
    )
    vector = torch.stack([m.to(logprob_N.dtype) for m in metrics])
    return surrogate + kl_loss + entropy_loss, kl, vector


def _is_zero(coefficient: float | Tensor) -> bool:
    """Whether the host knows that this is 0; a tensor is never asked."""
    return not isinstance(coefficient, Tensor) and coefficient == 0
