"""The operators in plain PyTorch, for any device and for float64 too; see `Backend`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops.arguments import (
    LossArguments,
    RowArguments,
    live_rows,
    stat_dtype,
)
from fastppo.ops.backends import AdvantagesArguments, GaeArguments, LossRows, Scores, Statistics
from fastppo.ops.losses.kl import kl_and_slope
from fastppo.ops.rows import (
    RowSpec,
    RowStats,
    block_slices,
    gradient,
    known_statistics,
    private,
    row_spec,
    statistics,
)
from fastppo.ops.surrogate import filled, loss_at, token_gradient, totals

WHITEN_EPS = 1e-8  # inside the root, as in TRL


def _rows_at(rows: RowArguments, at: slice) -> RowArguments:
    tau = rows.temperature
    if isinstance(tau, Tensor) and tau.ndim == 1:
        tau = tau[at]
    return rows._replace(token_N=rows.token_N[at], temperature=tau)


def _spec(
    rows: RowArguments, at: slice, dtype: torch.dtype, weight_N: Tensor | None = None
) -> RowSpec:
    """What the rows `at` need besides their logits; rows that are not live get finite values."""
    own = _rows_at(rows, at)
    return row_spec(own, live_rows(own, None if weight_N is None else weight_N[at]), dtype)


def token_logprobs(
    x_NV: Tensor,
    rows: RowArguments,
    at: slice,
    into: Statistics,
    weight_N: Tensor | None = None,
) -> None:
    """Write the statistics of the rows `at` into `into`; rows of weight 0 are not read."""
    dtype = into.logprob_N.dtype
    spec, own = _spec(rows, at, dtype, weight_N), Statistics(*(x_N[at] for x_N in into))
    for block in block_slices(x_NV, dtype):
        here = spec.at(block)
        found = statistics(private(x_NV[block], dtype), here)
        own.logprob_N[block], own.entropy_N[block] = found.logprob, found.entropy
        # Of logits as they are before the temperature, as the kernels leave it.
        dead = ~here.live_N
        own.row_max_N[block] = found.row_max.squeeze(1).masked_fill(dead, 0.0)
        own.sum_exp_N[block] = found.total.squeeze(1).masked_fill(dead, 0.0)


def token_logprobs_backward(
    x_NV: Tensor,
    out_NV: Tensor,
    rows: RowArguments,
    at: slice,
    stats: Statistics,
    g_N: Tensor | None,
    h_N: Tensor | None,
    weight_N: Tensor | None = None,
) -> None:
    """Write the gradient of the rows `at` into `out_NV`, which may be `x_NV` itself."""
    dtype = stats.logprob_N.dtype
    spec = _spec(rows, at, dtype, weight_N)
    own = Statistics(*(each_N[at] for each_N in stats))
    own_g = None if g_N is None else g_N[at]
    own_h = None if h_N is None else h_N[at]
    for block in block_slices(x_NV, dtype):
        here, known = spec.at(block), (each_N[block] for each_N in own)
        found = known_statistics(private(x_NV[block], dtype), here, *known)
        g = torch.zeros_like(found.logprob) if own_g is None else own_g[block]
        out_NV[block] = gradient(found, here, g, None if own_h is None else own_h[block])


def policy_loss(
    x_NV: Tensor,
    out_NV: Tensor | None,
    rows: RowArguments,
    loss: LossArguments,
    at: slice,
    into: LossRows,
) -> None:
    """Write log-prob and entropy of the rows `at`, and their gradient into `out_NV`, if given."""
    dtype, scale = into.logprob_N.dtype, loss.grad_scale
    spec, logprob_N, entropy_N = (
        _spec(rows, at, dtype, loss.weight_N),
        into.logprob_N[at],
        into.entropy_N[at],
    )
    own = filled(loss_at(loss, at), spec.live_N, dtype)
    for block in block_slices(x_NV, dtype):
        here = spec.at(block)
        found = statistics(private(x_NV[block], dtype), here)
        logprob_N[block], entropy_N[block] = found.logprob, found.entropy
        if out_NV is not None:
            g, h = token_gradient(loss_at(own, block), here.live_N, found.logprob)
            scaled_h = None if h is None else scale * h
            out_NV[block] = gradient(found, here, scale * g, scaled_h)


def loss_totals(
    rows: RowArguments, loss: LossArguments, into: LossRows
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KL of each token and the vector of PolicyMetrics, once all rows are computed."""
    live_N = live_rows(rows, loss.weight_N)
    whole = filled(loss, live_N, into.logprob_N.dtype)
    return totals(whole, live_N, into.logprob_N, into.entropy_N)


def score_tokens(x_NV: Tensor, ref_NV: Tensor, rows: RowArguments, at: slice, into: Scores) -> None:
    """Write both log-probs, entropy and exact KL of the rows `at` into `into`."""
    dtype = into.logprob_N.dtype
    spec, own = _spec(rows, at, dtype), Scores(*(x_N[at] for x_N in into))
    for block in block_slices(x_NV, dtype):
        x, ref = private(x_NV[block], dtype), private(ref_NV[block], dtype)
        here = spec.at(block)
        impossible, forbidden = x == float("-inf"), ref == float("-inf")
        actor, reference = statistics(x, here), statistics(ref, here)
        kl = _exact_kl(actor, reference, impossible, forbidden)
        own.logprob_N[block], own.ref_logprob_N[block] = actor.logprob, reference.logprob
        own.entropy_N[block] = actor.entropy
        own.exact_kl_N[block] = kl.masked_fill(~here.live_N, 0.0)


def _exact_kl(
    actor: RowStats, reference: RowStats, impossible: Tensor, forbidden: Tensor
) -> Tensor:
    log_ratio = actor.shifted - reference.shifted - (actor.log_sum_exp - reference.log_sum_exp)
    # Not inf in the product: a word that the reference masks may have p = 0 by underflow.
    infinite = (forbidden & ~impossible).any(-1)
    kl = (actor.exp.masked_fill(impossible, 0.0) / actor.sum_exp * log_ratio).sum(-1)
    return kl.masked_fill(infinite, float("inf"))


def scale_unless_one(x: Tensor, factor: Tensor, divisor: float | Tensor) -> None:
    """Multiply x by factor / divisor in place; on a CPU, x is not read if that is 1."""
    ratio = factor / divisor
    if ratio.device.type != "cpu" or ratio.item() != 1.0:
        x.mul_(ratio)


def token_kl(
    logprob_N: Tensor, ref_logprob_N: Tensor, kind: str, limit: float
) -> tuple[Tensor, Tensor]:
    """The KL estimate k of each token, and dk/dlogprob."""
    dtype = stat_dtype(logprob_N, ref_logprob_N)
    kl_N, slope_N = kl_and_slope(logprob_N.to(dtype), ref_logprob_N.to(dtype), kind, limit)
    return kl_N.clone(), slope_N.clone()  # a registered op hands out neither inputs nor twins


def token_kl_backward(slope_N: Tensor, grad_N: Tensor) -> Tensor:
    """slope * grad; 0 where the slope is 0, even if the gradient is infinite or NaN."""
    return torch.where(slope_N == 0, 0, grad_N * slope_N)


def value_loss(
    value_N: Tensor,
    old_value_N: Tensor,
    return_N: Tensor,
    weight_N: Tensor,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the vector of ValueMetrics, and dloss/dvalue."""
    dtype = stat_dtype(value_N, old_value_N, return_N, weight_N)
    live_N = weight_N != 0
    # where before the arithmetic: a NaN behind weight 0 would come back through 0 * NaN.
    value_N, old_N, target_N, weight_N = (
        torch.where(live_N, x, 0).to(dtype) for x in (value_N, old_value_N, return_N, weight_N)
    )
    error_N = (value_N - target_N).square()
    larger_error_N, slope_N = error_N, value_N - target_N
    clipped_N = torch.zeros_like(live_N)
    if clip is not None:
        clipped_value_N = torch.minimum(torch.maximum(value_N, old_N - clip), old_N + clip)
        clipped_error_N = (clipped_value_N - target_N).square()
        clipped_N = live_N & (clipped_error_N > error_N)
        larger_error_N = torch.where(clipped_N, clipped_error_N, error_N)
        # Where the clipped error is the larger one, the value was clipped: no gradient.
        slope_N = slope_N.masked_fill(clipped_N, 0)
    metrics = (  # in the order of ValueMetrics
        live_N.sum(),
        clipped_N.sum(),
        error_N.sum(),
        value_N.sum(),
        target_N.sum(),
        target_N.square().sum(),
    )
    vector = torch.stack([x.to(dtype) for x in metrics])
    return (weight_N * larger_error_N).sum() / 2, vector, weight_N * slope_N


def _live(x_N: Tensor, weight_N: Tensor | None) -> Tensor:
    return torch.ones_like(x_N, dtype=torch.bool) if weight_N is None else weight_N != 0


def moments(x_N: Tensor, weight_N: Tensor | None) -> Tensor:
    """Count, mean and sum of squared deviations (m2), as a tensor (3,)."""
    live_N = _live(x_N, weight_N)
    x_N = torch.where(live_N, x_N, 0).to(stat_dtype(x_N))
    count = live_N.sum().to(x_N.dtype)
    mean = x_N.sum() / count.clamp(min=1)
    # Two passes: the squares of deviations from the mean, not the difference of two large numbers.
    m2 = torch.where(live_N, x_N - mean, 0).square().sum()
    return torch.stack([count, mean, m2])


_own_moments = moments


def whiten(
    x_N: Tensor, weight_N: Tensor | None, moments: Tensor | None, shift_mean: bool
) -> Tensor:
    """The values, whitened by the moments (3,) if they are given, else by their own."""
    live_N = _live(x_N, weight_N)
    count, mean, m2 = (_own_moments(x_N, weight_N) if moments is None else moments).unbind(0)
    variance = torch.where(count > 1, m2 / (count - 1).clamp(min=1), 0)
    y_N = (x_N.to(mean.dtype) - mean) * torch.rsqrt(variance + WHITEN_EPS)
    return torch.where(live_N, y_N if shift_mean else y_N + mean, 0)


def gae(a: GaeArguments) -> tuple[Tensor, Tensor]:
    """Advantages and returns."""
    dtype = stat_dtype(a.reward_N, a.value_N)
    return _gae(
        a.reward_N.to(dtype), a.value_N.to(dtype), a.offsets, a.gamma, a.lam, a.bootstrap_value_B
    )


def _gae(
    reward_N: Tensor,
    value_N: Tensor,
    offsets: Tensor,
    gamma: float,
    lam: float,
    bootstrap_value_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A loop over time, which handles all sequences at once.

    Sequences lie right-aligned in a (T, B) table, so that step t of the loop is the t-th last token
    of each; where a shorter one has ended, the table holds zeros that lead nowhere.
    """
    batch = offsets.numel() - 1
    if reward_N.numel() == 0 or batch == 0:
        return torch.empty_like(reward_N), torch.empty_like(reward_N)
    length_B = offsets.diff().long()
    longest = int(length_B.max())
    back_T = torch.arange(longest, device=offsets.device)
    live_TB = back_T[:, None] < length_B
    index_TB = torch.where(live_TB, offsets[1:].long() - 1 - back_T[:, None], 0)
    value_TB = value_N[index_TB]
    after_B = reward_N.new_zeros(batch)
    if bootstrap_value_B is not None:
        after_B = bootstrap_value_B.to(reward_N.dtype)
    next_TB = torch.cat([after_B[None], value_TB[:-1]])
    delta_TB = reward_N[index_TB] + gamma * next_TB - value_TB
    carry_B = reward_N.new_zeros(batch)
    rows = []
    for delta_B in delta_TB.unbind(0):
        carry_B = delta_B + gamma * lam * carry_B
        rows.append(carry_B)
    advantage_N = torch.empty_like(reward_N)
    advantage_N[index_TB[live_TB]] = torch.stack(rows)[live_TB]
    return advantage_N, advantage_N + value_N


def advantages(a: AdvantagesArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards and KL."""
    dtype = stat_dtype(a.score_B, a.logprob_N, a.ref_logprob_N, a.value_N)
    if a.kl_N is None:
        logprob_N, ref_N = a.logprob_N.to(dtype), a.ref_logprob_N.to(dtype)
        kl_N, _ = kl_and_slope(logprob_N, ref_N, a.kl_kind, a.log_ratio_limit)
    else:
        kl_N = a.kl_N.to(dtype, copy=True)
    beta = a.kl_coef.to(dtype) if isinstance(a.kl_coef, Tensor) else a.kl_coef
    reward_N = -beta * kl_N
    if a.extra_reward_N is not None:
        reward_N = reward_N + a.extra_reward_N.to(dtype)
    reward_N = reward_N + _at_last_token(a.score_B.to(dtype), a.offsets, a.logprob_N.numel())
    if a.whiten_rewards:
        reward_N = whiten(reward_N, None, None, False)
    advantage_N, return_N = _gae(
        reward_N, a.value_N.to(dtype), a.offsets, a.gamma, a.lam, a.bootstrap_value_B
    )
    if a.whiten_advantages:
        advantage_N = whiten(advantage_N, None, None, True)
    return advantage_N, return_N, reward_N, kl_N


def _at_last_token(score_B: Tensor, offsets: Tensor, n: int) -> Tensor:
    """The scores at their sequences' last tokens, (n,), 0 elsewhere."""
    if n == 0:
        return score_B.new_zeros(0)
    # A sequence without tokens would point at its neighbour's last token: it adds 0 there.
    last_B = (offsets[1:].long() - 1).clamp(min=0)
    given_B = torch.where(offsets.diff() > 0, score_B, 0)
    return score_B.new_zeros(n).index_add(0, last_B, given_B)
