"""The gradient of one row of logits, in a sweep back over it.

For g = dL/dlogprob and h = dL/dentropy, with log p_v = (u_v - row_max) / tau - log sum_exp:

    dL/dz_v = g (1[v = token] - p_v) - h p_v (log p_v + H)

So everywhere but at the token dL/du_v = 2^shift_v (a + b shift_v), with two numbers of the row;
the token's own is written last, over what the sweep wrote there.
"""

import triton
import triton.language as tl

from fastppo.kernels.row import (
    LEAST_SHIFT,
    LN2,
    apply_softcap,
    excess_of,
    held_scale,
    load_ends,
    log2_scale_of,
    reference_of,
)
from fastppo.kernels.tile import (
    ends,
    is_in_row,
    is_whole,
    load_last,
    load_tile,
    load_words,
    on_boundary,
    split_row,
    tile_offsets,
    values,
)


@triton.jit
def row_factors(row_max, sum_exp, entropy, g, h, tau):
    """The scale of a row's shifts, their reference, a and b."""
    scale = held_scale(row_max, log2_scale_of(tau))
    excess = excess_of(row_max, scale)
    safe_sum_exp = tl.where(sum_exp == 0, 1.0, sum_exp)
    norm = tau * -(safe_sum_exp * tl.exp2(excess))
    of_entropy = h * (entropy - tl.log(safe_sum_exp) - excess * LN2)
    return scale, reference_of(row_max, scale), (g + of_entropy) / norm, h / norm * LN2


@triton.jit
def token_gradient(
    x,
    row_max,
    sum_exp,
    entropy,
    g,
    h,
    softcap,
    tau,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """dL/dx of the sampled token: 0 to the bit where it is the only one."""
    scale = held_scale(row_max, log2_scale_of(tau))
    excess = excess_of(row_max, scale)
    u, slope = apply_softcap(x, softcap, HAS_SOFTCAP)
    shift = tl.fma(u, scale, -reference_of(row_max, scale))
    safe_sum_exp = tl.where(sum_exp == 0, 1.0, sum_exp)
    p = tl.div_rn(tl.exp2(shift), safe_sum_exp * tl.exp2(excess))
    dz = g * (1.0 - p)
    if HAS_ENTROPY:
        logprob = (tl.maximum(shift, LEAST_SHIFT) - excess) * LN2 - tl.log(safe_sum_exp)
        dz -= h * p * (logprob + entropy)
    return tl.div_rn(dz, tau) * slope


@triton.jit
def logit_gradient(
    x, scale, reference, a, b, softcap, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr
):
    """dL/dx of logits that were not sampled."""
    u, slope = apply_softcap(x, softcap, HAS_SOFTCAP)
    shift = tl.fma(u, scale, -reference)
    inner = a
    if HAS_ENTROPY:
        inner = tl.fma(tl.maximum(shift, LEAST_SHIFT), b, a)
    dx = tl.exp2(shift) * inner
    if HAS_SOFTCAP:
        # The slope of masked vocabulary is that of the asymptote, 0, and its p is 0.
        dx = dx * slope
    return dx


@triton.jit
def store_gradient(
    words,
    ptr,
    scale,
    reference,
    a,
    b,
    softcap,
    TYPE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """The gradient of a tile of logits that is given as it lies in memory."""
    VECTOR: tl.constexpr = 128 // TYPE.primitive_bitwidth
    x = values(words, TYPE)
    dx = logit_gradient(x, scale, reference, a, b, softcap, HAS_SOFTCAP, HAS_ENTROPY)
    offsets = tile_offsets(words.shape[0], words.shape[1], VECTOR)
    tl.store(ptr + offsets, dx.to(ptr.dtype.element_ty), eviction_policy="evict_first")


@triton.jit
def write_gradient(
    row_ptr,
    words,
    out_ptr,
    V,
    token,
    row_max,
    sum_exp,
    entropy,
    g,
    h,
    softcap,
    tau,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    METHOD: tl.constexpr,
    TOGETHER: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The gradient of one row; may overwrite it.

    Back to front: what the first sweep read last is still in the caches. TOGETHER: the gradient's
    row lies as the logits' does, and is written in the same vectors. METHOD is that of `sweep`.
    """
    TYPE: tl.constexpr = row_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // TYPE.primitive_bitwidth
    ROUND: tl.constexpr = THREADS * VECTOR
    TILE: tl.constexpr = TILES * ROUND
    out_type = out_ptr.dtype.element_ty
    scale, reference, a, b = row_factors(row_max, sum_exp, entropy, g, h, tau)
    head, count = split_row(row_ptr, V, ALIGNED)
    known = (token >= 0) & (token < V)
    x_token = tl.load(row_ptr + tl.where(known, token, 0), mask=known, other=0.0).to(tl.float32)
    dx_token = token_gradient(
        x_token, row_max, sum_exp, entropy, g, h, softcap, tau, HAS_SOFTCAP, HAS_ENTROPY
    )
    # Every thread has loaded the token's logit before one writes over it.
    tl.debug_barrier()
    whole_ptr = on_boundary(row_ptr, head, ALIGNED)
    whole_out_ptr = out_ptr + head
    if TOGETHER:
        whole_out_ptr = on_boundary(out_ptr, head, ALIGNED)
    full = count // TILE * TILE
    if METHOD == "held":
        full = count
    if not ALIGNED:
        at, is_end = ends(head, count, V, VECTOR)
        x_ends = load_ends(row_ptr, head, count, V, "evict_first")
        dx_ends = logit_gradient(x_ends, scale, reference, a, b, softcap, HAS_SOFTCAP, HAS_ENTROPY)
        tl.store(out_ptr + at, dx_ends.to(out_type), mask=is_end, eviction_policy="evict_first")
    offsets = tile_offsets(1, THREADS, VECTOR)
    for start in range(full, count, ROUND):
        inside = is_whole(start, count, THREADS, VECTOR)
        x = load_last(whole_ptr + start, inside, THREADS, "evict_first")
        dx = logit_gradient(x, scale, reference, a, b, softcap, HAS_SOFTCAP, HAS_ENTROPY)
        tl.store(
            whole_out_ptr + start + offsets,
            dx.to(out_type),
            mask=inside,
            eviction_policy="evict_first",
        )
    offsets = tile_offsets(TILES, THREADS, VECTOR)
    if METHOD == "held":
        dx = logit_gradient(
            values(words, TYPE), scale, reference, a, b, softcap, HAS_SOFTCAP, HAS_ENTROPY
        )
        inside = is_in_row(count, TILES, THREADS, VECTOR)
        tl.store(
            whole_out_ptr + offsets, dx.to(out_type), mask=inside, eviction_policy="evict_first"
        )
    elif METHOD == "ahead":
        if full > 0:
            last = full - TILE
            near = load_words(whole_ptr + last, TILES, THREADS, "evict_first")
            for back in range(TILE, full - TILE, 2 * TILE):
                place = last - back
                far = load_words(whole_ptr + place, TILES, THREADS, "evict_first")
                to = whole_out_ptr + place + TILE
                store_gradient(
                    near, to, scale, reference, a, b, softcap, TYPE, HAS_SOFTCAP, HAS_ENTROPY
                )
                near = load_words(whole_ptr + place - TILE, TILES, THREADS, "evict_first")
                to = whole_out_ptr + place
                store_gradient(
                    far, to, scale, reference, a, b, softcap, TYPE, HAS_SOFTCAP, HAS_ENTROPY
                )
            even = full // TILE % 2 == 0
            to = whole_out_ptr + tl.where(even, TILE, 0)
            store_gradient(
                near, to, scale, reference, a, b, softcap, TYPE, HAS_SOFTCAP, HAS_ENTROPY
            )
            if even:
                far = load_words(whole_ptr, TILES, THREADS, "evict_first")
                store_gradient(
                    far,
                    whole_out_ptr,
                    scale,
                    reference,
                    a,
                    b,
                    softcap,
                    TYPE,
                    HAS_SOFTCAP,
                    HAS_ENTROPY,
                )
    else:
        for back in range(0, full, TILE):
            start = full - TILE - back
            x = load_tile(whole_ptr + start, TILES, THREADS, "evict_first")
            dx = logit_gradient(x, scale, reference, a, b, softcap, HAS_SOFTCAP, HAS_ENTROPY)
            to = whole_out_ptr + start + offsets
            tl.store(to, dx.to(out_type), eviction_policy="evict_first")
    # Every thread's vectors are written before the token's own gradient goes over one of them.
    tl.debug_barrier()
    tl.store(out_ptr + tl.where(known, token, 0), dx_token.to(out_type), mask=known)
