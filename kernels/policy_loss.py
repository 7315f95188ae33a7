"""PPO's loss of a row of logits and its gradient, in one launch.

A program goes over one row, or over every num_programs-th: sweep, the scalars of PPO, sweep back.
Every per-token loss reaches the logits through two scalars, g = dL/dlogprob and h = dL/dentropy:
another loss is another `surrogate`. Logits are those of rows first_row onwards, a chunk; what is
one a token is whole.
"""

import triton
import triton.language as tl

from fastppo.kernels.compilation import kernel
from fastppo.kernels.gradient import write_gradient
from fastppo.kernels.row import row_logprob, row_temperature, scalar
from fastppo.kernels.tile import fill_zero, load_row, row_of
from fastppo.kernels.token_kl import expm1_minus_arg, kl_and_slope


@triton.jit
def surrogate(
    logprob, behaviour, advantage, low, high, dual_clip, limit, HAS_DUAL_CLIP: tl.constexpr
):
    """Clipped loss, dloss/dlogprob, ratio, clamped log ratio; whether it was clipped low, high, and
    by the dual clip, and whether clamped."""
    # A sampled token of masked vocabulary has ratio 0, whatever the clamp would make of it.
    masked = logprob == float("-inf")
    raw = tl.where(masked, -limit, logprob - behaviour)
    log_ratio = tl.clamp(raw, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    clamped = (tl.abs(raw) > limit) & (masked == 0)
    ratio = tl.where(masked, 0.0, tl.exp(log_ratio))
    clipped_ratio = tl.clamp(ratio, low, high, propagate_nan=tl.PropagateNan.ALL)
    loss = tl.maximum(
        -advantage * ratio, -advantage * clipped_ratio, propagate_nan=tl.PropagateNan.ALL
    )
    clipped_high = (advantage > 0) & (ratio > high)
    clipped_low = (advantage < 0) & (ratio < low)
    dual_clipped = clipped_low & clipped_high  # none
    if HAS_DUAL_CLIP:
        bound = -dual_clip * advantage
        loss = tl.where((advantage < 0) & (loss > bound), bound, loss)
        dual_clipped = (advantage < 0) & (ratio > dual_clip)
    clipped = clipped_low | clipped_high | dual_clipped
    slope = tl.where(clipped | clamped | masked, 0.0, -advantage * ratio)
    return loss, slope, ratio, log_ratio, clipped_low, clipped_high, dual_clipped, clamped


@kernel("ignore_index", "first_row", "n_rows", "V", "x_stride", "dx_stride", "term_stride")
def policy_loss_kernel(
    x_ptr,
    dx_ptr,
    token_ptr,
    behaviour_ptr,
    advantage_ptr,
    weight_ptr,
    ref_ptr,
    importance_ptr,
    logprob_ptr,
    entropy_ptr,
    kl_ptr,
    term_ptr,
    row_max_ptr,
    sum_exp_ptr,
    temperature,
    kl_coef,
    entropy_coef,
    grad_scale,
    softcap,
    clip_low,
    clip_high,
    dual_clip,
    limit,
    ignore_index,
    first_row,
    n_rows,
    V,
    x_stride,
    dx_stride,
    term_stride,
    KL_KIND: tl.constexpr,
    KL_COEF_ON_DEVICE: tl.constexpr,
    ENTROPY_COEF_ON_DEVICE: tl.constexpr,
    GRAD_SCALE_ON_DEVICE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TEMPERATURE_KIND: tl.constexpr,
    TERMS: tl.constexpr,
    ALIGNED: tl.constexpr,
    METHOD: tl.constexpr,
    TOGETHER: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Statistics, the row's share of every metric and of the loss, and dL/dx unless dx_ptr is None.

    `term_ptr` is (TERMS, N): the metrics in the order of PolicyMetrics, the loss last. Where
    `row_max_ptr` is not None, token_logprobs_kernel has written a row's statistics before.
    """
    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        own = tl.cast(index, tl.int64)  # another name: Triton 3.4 keeps a name's type in a loop
        row = first_row + own
        token = tl.load(token_ptr + row)
        weight = tl.load(weight_ptr + row).to(tl.float32)
        own_term_ptr = term_ptr + row
        if (weight != 0) & (token != ignore_index):
            row_ptr = row_of(x_ptr, own, x_stride, ALIGNED)
            tau = row_temperature(temperature, row, TEMPERATURE_KIND)
            behaviour = tl.load(behaviour_ptr + row).to(tl.float32)
            advantage = tl.load(advantage_ptr + row).to(tl.float32)
            beta = scalar(kl_coef, KL_COEF_ON_DEVICE)
            bonus = scalar(entropy_coef, ENTROPY_COEF_ON_DEVICE)
            words = None
            if METHOD == "held":
                words = load_row(row_ptr, V, ALIGNED, TILES, THREADS)
            if row_max_ptr is None:
                logprob, entropy, row_max, sum_exp = row_logprob(
                    row_ptr,
                    words,
                    token,
                    V,
                    softcap,
                    tau,
                    HAS_SOFTCAP,
                    ALIGNED,
                    METHOD,
                    TILES,
                    THREADS,
                )
            else:
                logprob = tl.load(logprob_ptr + row)
                entropy = tl.load(entropy_ptr + row)
                row_max = tl.load(row_max_ptr + row)
                sum_exp = tl.load(sum_exp_ptr + row)

            loss, slope, ratio, log_ratio, clipped_low, clipped_high, dual_clipped, clamped = (
                surrogate(
                    logprob,
                    behaviour,
                    advantage,
                    1.0 - clip_low,
                    1.0 + clip_high,
                    dual_clip,
                    limit,
                    HAS_DUAL_CLIP,
                )
            )
            if importance_ptr is not None:
                importance = tl.load(importance_ptr + row).to(tl.float32)
                loss = loss * importance
                slope = slope * importance
            g = weight * slope
            kl = 0.0
            kl_loss = 0.0
            if ref_ptr is not None:
                ref = tl.load(ref_ptr + row).to(tl.float32)
                kl, kl_slope = kl_and_slope(logprob, ref, limit, KL_KIND)
                g += tl.where(beta == 0, 0.0, weight * beta * kl_slope)
                kl_loss = tl.where(beta == 0, 0.0, weight * beta * kl)
            # A masked sample's row takes no part in the loss, so its entropy passes no gradient.
            sampled = logprob > float("-inf")
            h = tl.where(sampled & (bonus != 0), -weight * bonus, 0.0)
            entropy_loss = h * entropy
            tl.store(logprob_ptr + row, logprob)
            tl.store(entropy_ptr + row, entropy)
            tl.store(kl_ptr + row, kl)
            tl.store(own_term_ptr, 1.0)
            tl.store(own_term_ptr + 1 * term_stride, ratio)
            tl.store(own_term_ptr + 2 * term_stride, ratio)
            tl.store(own_term_ptr + 3 * term_stride, tl.abs(log_ratio))
            clipped = clipped_low | clipped_high | dual_clipped
            tl.store(own_term_ptr + 4 * term_stride, tl.where(clipped, 1.0, 0.0))
            tl.store(own_term_ptr + 5 * term_stride, tl.where(clamped, 1.0, 0.0))
            tl.store(own_term_ptr + 6 * term_stride, expm1_minus_arg(log_ratio))
            tl.store(own_term_ptr + 7 * term_stride, -log_ratio)
            tl.store(own_term_ptr + 8 * term_stride, entropy)
            tl.store(own_term_ptr + 9 * term_stride, kl)
            tl.store(own_term_ptr + 10 * term_stride, weight * loss)
            tl.store(own_term_ptr + 11 * term_stride, kl_loss)
            tl.store(own_term_ptr + 12 * term_stride, entropy_loss)
            tl.store(own_term_ptr + 13 * term_stride, tl.where(clipped_low, 1.0, 0.0))
            tl.store(own_term_ptr + 14 * term_stride, tl.where(clipped_high, 1.0, 0.0))
            tl.store(own_term_ptr + 15 * term_stride, tl.where(dual_clipped, 1.0, 0.0))
            tl.store(own_term_ptr + 16 * term_stride, weight * loss + kl_loss + entropy_loss)
            if dx_ptr is not None:
                scale = scalar(grad_scale, GRAD_SCALE_ON_DEVICE)
                write_gradient(
                    row_ptr,
                    words,
                    row_of(dx_ptr, own, dx_stride, ALIGNED),
                    V,
                    token,
                    row_max,
                    sum_exp,
                    entropy,
                    tl.where(sampled, g * scale, 0.0),
                    h * scale,
                    softcap,
                    tau,
                    HAS_SOFTCAP,
                    HAS_ENTROPY,
                    ALIGNED,
                    METHOD,
                    TOGETHER,
                    TILES,
                    THREADS,
                )
        else:
            tl.store(logprob_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
            tl.store(kl_ptr + row, 0.0)
            for term in range(TERMS):
                tl.store(own_term_ptr + term * term_stride, 0.0)
            if dx_ptr is not None:
                fill_zero(row_of(dx_ptr, own, dx_stride, ALIGNED), V, ALIGNED, THREADS)
