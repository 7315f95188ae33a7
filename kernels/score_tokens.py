"""Two policies' rows read together: log-probs, entropy and the exact KL. One program a row."""

import triton
import triton.language as tl

from fastppo.kernels.row import (
    LOWEST,
    MASKED,
    MAX_SHIFT,
    accumulate,
    accumulate_sum_exp,
    apply_softcap,
    finish_statistics,
    log2_scale_of,
    merge_lanes,
    row_temperature,
    sampled_logit,
)


@triton.jit
def accumulate_pair(
    x,
    y,
    row_max,
    sum_exp,
    sum_shifted_exp,
    sum_diff_exp,
    ref_min,
    ref_row_max,
    ref_sum_exp,
    softcap,
    log2_scale,
    HAS_SOFTCAP: tl.constexpr,
):
    """One more logit of each policy a lane; sum_diff_exp = sum (u - v) exp((u - row_max) / tau).

    `ref_min` is the least v of words that the actor allows: -inf where the reference masks one.
    """
    u, _ = apply_softcap(x, softcap, HAS_SOFTCAP)
    v, _ = apply_softcap(y, softcap, HAS_SOFTCAP)
    possible = u != MASKED
    theirs = tl.where(possible, v, 0.0)
    differs = tl.where(possible, u, 0.0) - theirs
    ref_min = tl.minimum(ref_min, theirs)
    row_max, sum_exp, sum_shifted_exp, rescale, new_exp = accumulate(
        u, row_max, sum_exp, sum_shifted_exp, log2_scale
    )
    sum_diff_exp = sum_diff_exp * rescale + differs * new_exp
    ref_row_max, ref_sum_exp = accumulate_sum_exp(v, ref_row_max, ref_sum_exp, log2_scale)
    return row_max, sum_exp, sum_shifted_exp, sum_diff_exp, ref_min, ref_row_max, ref_sum_exp


@triton.jit(do_not_specialize=["ignore_index", "first_row"])
def score_tokens_kernel(
    x_ptr,
    ref_ptr,
    token_ptr,
    logprob_ptr,
    ref_logprob_ptr,
    entropy_ptr,
    kl_ptr,
    temperature,
    softcap,
    ignore_index,
    first_row,
    V,
    x_stride,
    ref_stride,
    HAS_SOFTCAP: tl.constexpr,
    TEMPERATURE_KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both rows once, no gradient."""
    own = tl.program_id(0).to(tl.int64)
    row = first_row + own
    token = tl.load(token_ptr + row)
    logprob = 0.0
    ref_logprob = 0.0
    entropy = 0.0
    kl = 0.0
    if token != ignore_index:
        tau = row_temperature(temperature, row, TEMPERATURE_KIND)
        log2_scale = log2_scale_of(tau)
        x_row = x_ptr + own * x_stride
        ref_row = ref_ptr + own * ref_stride
        u = sampled_logit(x_row, token, V, softcap, HAS_SOFTCAP)
        v = sampled_logit(ref_row, token, V, softcap, HAS_SOFTCAP)
        lane = tl.arange(0, BLOCK)
        row_max = tl.full([BLOCK], LOWEST, tl.float32)
        ref_row_max = tl.full([BLOCK], LOWEST, tl.float32)
        sum_exp = tl.zeros([BLOCK], tl.float32)
        sum_shifted_exp = tl.zeros([BLOCK], tl.float32)
        sum_diff_exp = tl.zeros([BLOCK], tl.float32)
        ref_min = tl.zeros([BLOCK], tl.float32)
        ref_sum_exp = tl.zeros([BLOCK], tl.float32)
        full = V // BLOCK * BLOCK
        for start in range(0, full, BLOCK):
            x = tl.load(x_row + start + lane, eviction_policy="evict_first").to(tl.float32)
            y = tl.load(ref_row + start + lane, eviction_policy="evict_first").to(tl.float32)
            row_max, sum_exp, sum_shifted_exp, sum_diff_exp, ref_min, ref_row_max, ref_sum_exp = (
                accumulate_pair(
                    x,
                    y,
                    row_max,
                    sum_exp,
                    sum_shifted_exp,
                    sum_diff_exp,
                    ref_min,
                    ref_row_max,
                    ref_sum_exp,
                    softcap,
                    log2_scale,
                    HAS_SOFTCAP,
                )
            )
        if full < V:
            at = full + lane
            x = tl.load(x_row + at, mask=at < V, other=MASKED, eviction_policy="evict_first")
            y = tl.load(ref_row + at, mask=at < V, other=MASKED, eviction_policy="evict_first")
            row_max, sum_exp, sum_shifted_exp, sum_diff_exp, ref_min, ref_row_max, ref_sum_exp = (
                accumulate_pair(
                    x.to(tl.float32),
                    y.to(tl.float32),
                    row_max,
                    sum_exp,
                    sum_shifted_exp,
                    sum_diff_exp,
                    ref_min,
                    ref_row_max,
                    ref_sum_exp,
                    softcap,
                    log2_scale,
                    HAS_SOFTCAP,
                )
            )
        d = tl.maximum(row_max - tl.max(row_max, 0), -MAX_SHIFT)
        row_sum_diff_exp = tl.sum(sum_diff_exp * tl.exp2(d * log2_scale), 0)
        top, row_sum_exp, row_sum_shifted_exp = merge_lanes(
            row_max, sum_exp, sum_shifted_exp, log2_scale
        )
        ref_top, ref_row_sum_exp, _ = merge_lanes(ref_row_max, ref_sum_exp, ref_sum_exp, log2_scale)
        logprob, entropy, log_sum_exp = finish_statistics(
            u, top, row_sum_exp, row_sum_shifted_exp, tau
        )
        ref_logprob, _, ref_log_sum_exp = finish_statistics(
            v, ref_top, ref_row_sum_exp, ref_row_sum_exp, tau
        )
        safe_sum_exp = tl.where(row_sum_exp == 0, 1.0, row_sum_exp)
        # KL = sum p (z - z_ref) - LSE(z) + LSE(z_ref)
        kl = tl.div_rn(tl.div_rn(row_sum_diff_exp, safe_sum_exp) - (top - ref_top), tau) - (
            log_sum_exp - ref_log_sum_exp
        )
        kl = tl.where(tl.min(ref_min, 0) == MASKED, float("inf"), kl)
        kl = tl.where(row_sum_exp == 0, 0.0, kl)
    tl.store(logprob_ptr + row, logprob)
    tl.store(ref_logprob_ptr + row, ref_logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(kl_ptr + row, kl)
