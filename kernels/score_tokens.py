"""Two policies' rows read together: log-probs, entropy and the exact KL."""

import triton
import triton.language as tl

from fastppo.kernels.compilation import kernel
from fastppo.kernels.row import (
    MASKED,
    accumulate,
    accumulate_sum_exp2,
    at_first,
    capped,
    finish_statistics,
    load_ends,
    log2_scale_of,
    lowest,
    merge_threads,
    next_scale,
    reference_of,
    row_temperature,
    sampled_logit,
    sums_of_ends,
    thread_sum,
    to_row_max,
)
from fastppo.kernels.tile import (
    is_whole,
    load_last,
    load_tile,
    on_boundary,
    row_of,
    split_row,
)

LEAST_LOGIT = tl.constexpr(-1e30)  # what masked vocabulary counts as, with weight 0


@triton.jit
def difference(u, v):
    """u - v, and v, where the actor allows a word; what it masks has weight 0 whatever these are.

    The least v is -inf where the reference masks a word that the actor allows.
    """
    theirs = tl.where(u == MASKED, 0.0, v)
    return tl.maximum(u, LEAST_LOGIT) - theirs, theirs


@triton.jit
def thread_min(x):
    return tl.min(tl.min(x, 2), 0)


@triton.jit
def accumulate_pair(
    x,
    y,
    row_max,
    reference,
    sum_exp2,
    sum_shift,
    sum_diff,
    ref_min,
    ref_row_max,
    ref_reference,
    ref_sum_exp2,
    softcap,
    scale,
    ref_scale,
    HAS_SOFTCAP: tl.constexpr,
):
    """A thread's sums with a tile of each policy more; sum_diff = sum (u - v) 2^shift."""
    u = capped(x, softcap, HAS_SOFTCAP)
    v = capped(y, softcap, HAS_SOFTCAP)
    differs, theirs = difference(u, v)
    ref_min = tl.minimum(ref_min, thread_min(theirs))
    row_max, reference, sum_exp2, sum_shift, rescale, e = accumulate(
        u, row_max, reference, sum_exp2, sum_shift, scale
    )
    sum_diff = sum_diff * rescale + thread_sum(e * differs)
    ref_row_max, ref_reference, ref_sum_exp2 = accumulate_sum_exp2(
        v, ref_row_max, ref_reference, ref_sum_exp2, ref_scale
    )
    return (
        row_max,
        reference,
        sum_exp2,
        sum_shift,
        sum_diff,
        ref_min,
        ref_row_max,
        ref_reference,
        ref_sum_exp2,
    )


@triton.jit
def sweep_pair(
    x_row,
    ref_row,
    V,
    softcap,
    scale,
    ref_scale,
    HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOGETHER: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Both rows once: the sums of the actor's, those of the pair, those of the reference's."""
    VECTOR: tl.constexpr = 128 // x_row.dtype.element_ty.primitive_bitwidth
    ROUND: tl.constexpr = THREADS * VECTOR
    head, count = split_row(x_row, V, ALIGNED)
    zero = tl.zeros([THREADS], tl.float32)
    row_max = lowest(scale) + zero
    sum_exp2 = zero
    sum_shift = zero
    sum_diff = zero
    ref_min = zero
    ref_row_max = lowest(ref_scale) + zero
    ref_sum_exp2 = zero
    if not ALIGNED:
        x_ends = load_ends(x_row, head, count, V, "evict_first")
        y_ends = load_ends(ref_row, head, count, V, "evict_first")
        u_ends = capped(x_ends, softcap, HAS_SOFTCAP)
        v_ends = capped(y_ends, softcap, HAS_SOFTCAP)
        differs, theirs = difference(u_ends, v_ends)
        end_max, end_sum, end_shift, e = sums_of_ends(u_ends, scale)
        ref_end_max, ref_end_sum, _ref_shift, _ref_exp = sums_of_ends(v_ends, ref_scale)
        row_max = at_first(end_max, lowest(scale), THREADS)
        sum_exp2 = at_first(end_sum, 0.0, THREADS)
        sum_shift = at_first(end_shift, 0.0, THREADS)
        sum_diff = at_first(tl.sum(e * differs, 0), 0.0, THREADS)
        ref_min = at_first(tl.min(theirs, 0), 0.0, THREADS)
        ref_row_max = at_first(ref_end_max, lowest(ref_scale), THREADS)
        ref_sum_exp2 = at_first(ref_end_sum, 0.0, THREADS)
    reference = reference_of(row_max, scale)
    ref_reference = reference_of(ref_row_max, ref_scale)
    whole_ptr = on_boundary(x_row, head, ALIGNED)
    whole_ref_ptr = ref_row + head
    if TOGETHER:
        whole_ref_ptr = on_boundary(ref_row, head, ALIGNED)
    full = count // (TILES * ROUND) * (TILES * ROUND)
    for start in range(0, full, TILES * ROUND):
        x = load_tile(whole_ptr + start, TILES, THREADS, "evict_first")
        y = load_tile(whole_ref_ptr + start, TILES, THREADS, "evict_first", TOGETHER)
        (
            row_max,
            reference,
            sum_exp2,
            sum_shift,
            sum_diff,
            ref_min,
            ref_row_max,
            ref_reference,
            ref_sum_exp2,
        ) = accumulate_pair(
            x,
            y,
            row_max,
            reference,
            sum_exp2,
            sum_shift,
            sum_diff,
            ref_min,
            ref_row_max,
            ref_reference,
            ref_sum_exp2,
            softcap,
            scale,
            ref_scale,
            HAS_SOFTCAP,
        )
    for start in range(full, count, ROUND):
        inside = is_whole(start, count, THREADS, VECTOR)
        x = load_last(whole_ptr + start, inside, THREADS, "evict_first")
        y = load_last(whole_ref_ptr + start, inside, THREADS, "evict_first", TOGETHER)
        (
            row_max,
            reference,
            sum_exp2,
            sum_shift,
            sum_diff,
            ref_min,
            ref_row_max,
            ref_reference,
            ref_sum_exp2,
        ) = accumulate_pair(
            x,
            y,
            row_max,
            reference,
            sum_exp2,
            sum_shift,
            sum_diff,
            ref_min,
            ref_row_max,
            ref_reference,
            ref_sum_exp2,
            softcap,
            scale,
            ref_scale,
            HAS_SOFTCAP,
        )
    row_diff = tl.sum(sum_diff * tl.exp2(reference - reference_of(tl.max(row_max, 0), scale)), 0)
    top, sum_exp2, sum_shift = merge_threads(row_max, reference, sum_exp2, sum_shift, scale)
    ref_top, ref_sum_exp2, _ = merge_threads(
        ref_row_max, ref_reference, ref_sum_exp2, zero, ref_scale
    )
    return top, sum_exp2, sum_shift, row_diff, tl.min(ref_min, 0), ref_top, ref_sum_exp2


@kernel("ignore_index", "first_row", "n_rows", "V", "x_stride", "ref_stride")
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
    n_rows,
    V,
    x_stride,
    ref_stride,
    HAS_SOFTCAP: tl.constexpr,
    TEMPERATURE_KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOGETHER: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Both rows once, no gradient."""
    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        own = tl.cast(index, tl.int64)  # another name: Triton 3.4 keeps a name's type in a loop
        row = first_row + own
        token = tl.load(token_ptr + row)
        logprob = 0.0
        ref_logprob = 0.0
        entropy = 0.0
        kl = 0.0
        if token != ignore_index:
            tau = row_temperature(temperature, row, TEMPERATURE_KIND)
            x_row = row_of(x_ptr, own, x_stride, ALIGNED)
            ref_row = row_of(ref_ptr, own, ref_stride, ALIGNED)
            u = sampled_logit(x_row, token, V, softcap, HAS_SOFTCAP)
            v = sampled_logit(ref_row, token, V, softcap, HAS_SOFTCAP)
            log2_scale = log2_scale_of(tau)
            scale = log2_scale
            ref_scale = scale
            held = scale
            ref_held = scale
            top = scale * 0.0
            sum_exp2 = scale * 0.0
            sum_shift = scale * 0.0
            sum_diff = scale * 0.0
            ref_min = scale * 0.0
            ref_top = scale * 0.0
            ref_sum_exp2 = scale * 0.0
            sweeps = 0
            while sweeps < 3:
                scale = held
                ref_scale = ref_held
                top, sum_exp2, sum_shift, sum_diff, ref_min, ref_top, ref_sum_exp2 = sweep_pair(
                    x_row,
                    ref_row,
                    V,
                    softcap,
                    scale,
                    ref_scale,
                    HAS_SOFTCAP,
                    ALIGNED,
                    TOGETHER,
                    TILES,
                    THREADS,
                )
                held = next_scale(top, scale, log2_scale)
                ref_held = next_scale(ref_top, ref_scale, log2_scale)
                sweeps = tl.where((held == scale) & (ref_held == ref_scale), 3, sweeps + 1)
            mean_diff = tl.div_rn(sum_diff, tl.where(sum_exp2 == 0, 1.0, sum_exp2))
            top, sum_exp, mean_shift = to_row_max(top, sum_exp2, sum_shift, scale)
            ref_top, ref_sum_exp, _ = to_row_max(ref_top, ref_sum_exp2, ref_sum_exp2, ref_scale)
            logprob, entropy, log_sum_exp = finish_statistics(u, top, sum_exp, mean_shift, tau)
            ref_logprob, _, ref_log_sum_exp = finish_statistics(v, ref_top, ref_sum_exp, 0.0, tau)
            # KL = sum p (z - z_ref) - LSE(z) + LSE(z_ref)
            kl = tl.div_rn(mean_diff - (top - ref_top), tau) - (log_sum_exp - ref_log_sum_exp)
            kl = tl.where(ref_min == MASKED, float("inf"), kl)
            kl = tl.where(sum_exp == 0, 0.0, kl)
        tl.store(logprob_ptr + row, logprob)
        tl.store(ref_logprob_ptr + row, ref_logprob)
        tl.store(entropy_ptr + row, entropy)
        tl.store(kl_ptr + row, kl)
