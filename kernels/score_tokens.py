"""Two policies' rows read together: log-probs, entropy and the exact KL. One program a row."""

import triton
import triton.language as tl

from fastppo.kernels.row import (
    FAR,
    LOWEST,
    MASKED,
    accumulate,
    accumulate_total,
    bend,
    bits_of,
    finish_statistics,
    merge_lanes,
    row_temperature,
    sampled_logit,
)


@triton.jit
def both(
    x,
    y,
    highest,
    total,
    weighted,
    gap,
    lowest,
    ref_highest,
    ref_total,
    softcap,
    bits,
    HAS_SOFTCAP: tl.constexpr,
):
    """One more logit of each policy a lane; gap = sum (u - v) exp((u - highest) / tau).

    `lowest` is the least v of words that the actor allows: -inf where the reference masks one.
    """
    u, _ = bend(x, softcap, HAS_SOFTCAP)
    v, _ = bend(y, softcap, HAS_SOFTCAP)
    possible = u != MASKED
    theirs = tl.where(possible, v, 0.0)
    differs = tl.where(possible, u, 0.0) - theirs
    lowest = tl.minimum(lowest, theirs)
    highest, total, weighted, keep, new = accumulate(u, highest, total, weighted, bits)
    gap = gap * keep + differs * new
    ref_highest, ref_total = accumulate_total(v, ref_highest, ref_total, bits)
    return highest, total, weighted, gap, lowest, ref_highest, ref_total


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
        bits = bits_of(tau)
        x_row = x_ptr + own * x_stride
        ref_row = ref_ptr + own * ref_stride
        u = sampled_logit(x_row, token, V, softcap, HAS_SOFTCAP)
        v = sampled_logit(ref_row, token, V, softcap, HAS_SOFTCAP)
        lane = tl.arange(0, BLOCK)
        highest = tl.full([BLOCK], LOWEST, tl.float32)
        ref_highest = tl.full([BLOCK], LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        weighted = tl.zeros([BLOCK], tl.float32)
        gap = tl.zeros([BLOCK], tl.float32)
        lowest = tl.zeros([BLOCK], tl.float32)
        ref_total = tl.zeros([BLOCK], tl.float32)
        full = V // BLOCK * BLOCK
        for start in range(0, full, BLOCK):
            x = tl.load(x_row + start + lane, eviction_policy="evict_first").to(tl.float32)
            y = tl.load(ref_row + start + lane, eviction_policy="evict_first").to(tl.float32)
            highest, total, weighted, gap, lowest, ref_highest, ref_total = both(
                x,
                y,
                highest,
                total,
                weighted,
                gap,
                lowest,
                ref_highest,
                ref_total,
                softcap,
                bits,
                HAS_SOFTCAP,
            )
        if full < V:
            at = full + lane
            x = tl.load(x_row + at, mask=at < V, other=MASKED, eviction_policy="evict_first")
            y = tl.load(ref_row + at, mask=at < V, other=MASKED, eviction_policy="evict_first")
            highest, total, weighted, gap, lowest, ref_highest, ref_total = both(
                x.to(tl.float32),
                y.to(tl.float32),
                highest,
                total,
                weighted,
                gap,
                lowest,
                ref_highest,
                ref_total,
                softcap,
                bits,
                HAS_SOFTCAP,
            )
        d = tl.maximum(highest - tl.max(highest, 0), -FAR)
        gap_sum = tl.sum(gap * tl.exp2(d * bits), 0)
        top, row_total, row_weighted = merge_lanes(highest, total, weighted, bits)
        ref_top, ref_row_total, _ = merge_lanes(ref_highest, ref_total, ref_total, bits)
        logprob, entropy, log_total = finish_statistics(u, top, row_total, row_weighted, tau)
        ref_logprob, _, ref_log_total = finish_statistics(
            v, ref_top, ref_row_total, ref_row_total, tau
        )
        some = tl.where(row_total == 0, 1.0, row_total)
        # KL = sum p (z - z_ref) - LSE(z) + LSE(z_ref)
        kl = tl.div_rn(tl.div_rn(gap_sum, some) - (top - ref_top), tau) - (
            log_total - ref_log_total
        )
        kl = tl.where(tl.min(lowest, 0) == MASKED, float("inf"), kl)
        kl = tl.where(row_total == 0, 0.0, kl)
    tl.store(logprob_ptr + row, logprob)
    tl.store(ref_logprob_ptr + row, ref_logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(kl_ptr + row, kl)
