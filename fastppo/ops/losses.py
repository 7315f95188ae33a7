"""PPO's loss of a token, as a function of its log-prob: plain PyTorch on (N,), the definition.

Every per-token loss reaches the logits through two scalars, g = dL/dlogprob and h = dL/dentropy.
The kernels over logits have the clipped surrogate fused (`kernels/policy_loss.py` and
`kernels/cpu/surrogate.h`), held to this one by tests/ops/test_losses.py. A new loss is written
here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor

from fastppo.ops.arguments import LossArguments, RowArguments, live_rows

if TYPE_CHECKING:
    from fastppo.ops.backends import Backend, Statistics
    from fastppo.ops.rows import Chunks


class PolicyMetrics(NamedTuple):
    """Sums over the live tokens of a batch, as 0-d tensors; `merge` adds those of two batches.

    `count` is the number of live tokens; divide the `*_sum` fields by it to get means. The last
    three include the loss weights: they add up to the loss.
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


TERMS: Final = len(PolicyMetrics._fields) + 1  # the metrics, and the loss last
RATIO_MAX: Final = PolicyMetrics._fields.index("ratio_max")  # the one that is no sum


def ppo_clip(
    ratio_N: Tensor,
    advantage_N: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""PPO's clipped surrogate of each token, in units of the advantage, and where it is clipped.

        L = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))
        L = min(L, -dual_clip A)  where A < 0

    Args:
        ratio_N: float (N,), probability of the sampled token now over that when it was sampled;
            differentiable.
        advantage_N: float (N,).
        clip_low, clip_high, dual_clip: as in PolicyLossConfig.

    Returns:
        loss_N, and clipped_N, bool (N,): the tokens whose gradient the clip cut. Of the others the
        loss's derivative in the ratio is -A.

    Source: Schulman et al. 2017, Proximal Policy Optimization Algorithms, eq. 7; Ye et al. 2020,
        arXiv 1912.09729 (dual clip).
    """
    low, high = 1 - clip_low, 1 + clip_high
    loss_N = torch.maximum(-advantage_N * ratio_N, -advantage_N * ratio_N.clamp(low, high))
    clipped_N = ((advantage_N > 0) & (ratio_N > high)) | ((advantage_N < 0) & (ratio_N < low))
    if dual_clip is not None:
        bound_N = -dual_clip * advantage_N
        loss_N = torch.where((advantage_N < 0) & (loss_N > bound_N), bound_N, loss_N)
        clipped_N = clipped_N | ((advantage_N < 0) & (ratio_N > dual_clip))
    return loss_N, clipped_N


def kl_and_slope(
    logprob_N: Tensor, ref_logprob_N: Tensor, kind: str, limit: float
) -> tuple[Tensor, Tensor]:
    """k and dk/dlogprob; both 0 where the sampled token is masked vocabulary (logprob -inf)."""
    masked = logprob_N == float("-inf")
    diff = torch.where(masked, 0, logprob_N - ref_logprob_N)
    if kind == "k1":
        kl, slope = diff, torch.ones_like(diff)
    elif kind == "abs":
        kl, slope = diff.abs(), diff.sign()
    elif kind == "k2":
        kl, slope = diff.square() / 2, diff
    else:
        e = (-diff).clamp(-limit, limit)
        kl = torch.expm1(e) - e
        slope = torch.where(diff.abs() <= limit, -torch.expm1(e), 0)
    return kl, slope.masked_fill(masked, 0)


def filled(loss: LossArguments, live_N: Tensor, dtype: torch.dtype) -> LossArguments:
    """The loss arguments in `dtype`, with finite values at tokens that are not live."""

    def fill(tensor: Tensor) -> Tensor:
        return torch.where(live_N, tensor, 0).to(dtype)

    def coefficient(value: float | Tensor) -> float | Tensor:
        return value.to(dtype) if isinstance(value, Tensor) else value

    ref, importance = loss.ref_logprob_N, loss.importance_weight_N
    return loss._replace(
        behaviour_logprob_N=fill(loss.behaviour_logprob_N),
        advantage_N=fill(loss.advantage_N),
        weight_N=fill(loss.weight_N),
        ref_logprob_N=None if ref is None else fill(ref),
        importance_weight_N=None if importance is None else fill(importance),
        kl_coef=coefficient(loss.kl_coef),
        entropy_coef=coefficient(loss.entropy_coef),
    )


class _Surrogate(NamedTuple):
    """The clipped surrogate of each token, with what the metrics count."""

    loss_N: Tensor  # u L
    slope_N: Tensor  # d(u L)/d(log ratio), 0 where clipped, clamped, masked or not live
    ratio_N: Tensor
    log_ratio_N: Tensor  # of the token, clamped
    clipped_N: Tensor
    clamped_N: Tensor


def sequence_index(offsets: Tensor, n: int) -> Tensor:
    """The index of each token's sequence, int64 (N,); the host does not wait for the device."""
    at = torch.arange(n, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), at, right=True)


def _segment_sum(x_N: Tensor, offsets: Tensor) -> Tensor:
    """Sums by sequence, (B,), in a fixed order."""
    return torch.segment_reduce(
        x_N, "sum", offsets=offsets.long(), axis=0, initial=0.0, unsafe=True
    )


def _sequence_mean(x_N: Tensor, offsets: Tensor | None, live_N: Tensor) -> Tensor:
    """For each token, the mean over the live tokens of its sequence."""
    assert offsets is not None
    total_B = _segment_sum(x_N.masked_fill(~live_N, 0), offsets)
    count_B = _segment_sum(live_N.to(x_N.dtype), offsets)
    return (total_B / count_B.clamp(min=1))[sequence_index(offsets, x_N.numel())]


def _surrogate(loss: LossArguments, live_N: Tensor, logprob_N: Tensor) -> _Surrogate:
    limit = loss.log_ratio_limit
    # A sampled token of masked vocabulary has ratio 0, whatever the clamp would make of it.
    masked = logprob_N == float("-inf")
    raw = torch.where(masked, -limit, logprob_N - loss.behaviour_logprob_N)
    raw = raw.masked_fill(~live_N, 0)
    log_ratio = raw.clamp(-limit, limit)
    used = raw
    if loss.by_sequence:
        used = _sequence_mean(raw.masked_fill(masked, float("-inf")), loss.offsets, live_N)
        masked = used == float("-inf")
    clamped = ((used > limit) | (used < -limit)) & live_N & ~masked
    ratio = used.clamp(-limit, limit).exp().masked_fill(masked, 0)
    surrogate, clipped = ppo_clip(
        ratio,
        loss.advantage_N,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=loss.dual_clip,
    )
    slope = (-loss.advantage_N * ratio).masked_fill(clipped | clamped | masked | ~live_N, 0)
    if loss.importance_weight_N is not None:
        surrogate, slope = surrogate * loss.importance_weight_N, slope * loss.importance_weight_N
    return _Surrogate(surrogate, slope, ratio, log_ratio, clipped & live_N, clamped)


def token_gradient(
    loss: LossArguments, live_N: Tensor, logprob_N: Tensor
) -> tuple[Tensor, Tensor | None]:
    """g and h of each token; h is None where the entropy has no weight."""
    g = loss.weight_N * _surrogate(loss, live_N, logprob_N).slope_N
    if loss.by_sequence:
        # Each token moves its sequence's ratio by 1 / length, and so the loss of all its tokens.
        g = _sequence_mean(g, loss.offsets, live_N)
    if loss.has_kl:
        assert loss.ref_logprob_N is not None
        _, kl_slope = kl_and_slope(
            logprob_N, loss.ref_logprob_N, loss.kl_kind, loss.log_ratio_limit
        )
        g = g + loss.weight_N * loss.kl_coef * kl_slope
    h = None
    if loss.has_entropy:
        # The row of a masked sample takes no part in the loss, so its entropy passes no gradient.
        h = (-loss.weight_N * loss.entropy_coef).masked_fill(logprob_N == float("-inf"), 0)
    return g, h


def totals(
    loss: LossArguments, live_N: Tensor, logprob_N: Tensor, entropy_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KL of each token (0 without a reference) and the vector of metrics."""
    weight = loss.weight_N
    terms = _surrogate(loss, live_N, logprob_N)
    zero = logprob_N.new_zeros(())

    def total(x: Tensor) -> Tensor:
        return x.masked_fill(~live_N, 0).sum()

    surrogate = total(weight * terms.loss_N)
    kl_loss = entropy_loss = kl_sum = zero
    kl = torch.zeros_like(logprob_N)
    if loss.ref_logprob_N is not None:
        kl, _ = kl_and_slope(logprob_N, loss.ref_logprob_N, loss.kl_kind, loss.log_ratio_limit)
        kl = kl.masked_fill(~live_N, 0)
        kl_sum = kl.sum()
        if loss.has_kl:
            kl_loss = total(weight * loss.kl_coef * kl)
    if loss.has_entropy:
        masked = logprob_N == float("-inf")
        entropy_loss = -total((weight * loss.entropy_coef * entropy_N).masked_fill(masked, 0))
    ratio = terms.ratio_N.masked_fill(~live_N, 0)
    metrics = PolicyMetrics(
        count=live_N.sum(),
        ratio_sum=ratio.sum(),
        ratio_max=ratio.amax() if ratio.numel() else zero,
        log_ratio_abs_sum=total(terms.log_ratio_N.abs()),
        clipped_sum=terms.clipped_N.sum(),
        clamped_sum=terms.clamped_N.sum(),
        approx_kl_sum=total(torch.expm1(terms.log_ratio_N) - terms.log_ratio_N),
        policy_kl_sum=-total(terms.log_ratio_N),
        entropy_sum=total(entropy_N),
        kl_sum=kl_sum,
        surrogate=surrogate,
        kl_loss=kl_loss,
        entropy_loss=entropy_loss,
    )
    vector = torch.stack([m.to(logprob_N.dtype) for m in metrics])
    return surrogate + kl_loss + entropy_loss, kl, vector


def sweep_by_sequence(
    kernels: Backend,
    chunks: Chunks,
    rows: RowArguments,
    loss: LossArguments,
    stats: Statistics,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`totals` with a ratio per sequence: one pass for all log-probs, one for the gradient."""
    weight_N = loss.weight_N
    chunks.visit(
        lambda at, x_NV, _: kernels.token_logprobs(x_NV, rows, at, stats, weight_N), write=False
    )
    live_N = live_rows(rows, weight_N)
    whole = filled(loss, live_N, stats.logprob_N.dtype)
    if need_grad:
        g_N, h_N = token_gradient(whole, live_N, stats.logprob_N)
        g_N, h_N = loss.grad_scale * g_N, None if h_N is None else loss.grad_scale * h_N

        def backward(at: slice, x_NV: Tensor, out_NV: Tensor | None) -> None:
            assert out_NV is not None
            kernels.token_logprobs_backward(x_NV, out_NV, rows, at, stats, g_N, h_N, weight_N)

        chunks.visit(backward, write=True)
    return totals(whole, live_N, stats.logprob_N, stats.entropy_N)
