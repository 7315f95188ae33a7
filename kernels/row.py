"""One row of logits: its normaliser and entropy in one sweep, its gradient in the next.

    z = u / tau with u = x, or softcap * tanh(x / softcap);  p = softmax(z)
    row_max = max u,  sum_exp = sum exp((u - row_max) / tau)

A thread takes the maximum of a tile first and rescales its sums once a tile; then a logit costs a
fused multiply-add, an exponential and an addition, and another two for the entropy:

    shift = u * scale - reference, rounded once;  scale = log2(e) / tau, reference = row_max * scale
    sum_exp2 = sum 2^shift,  sum_shift = sum shift * 2^shift

The reference is rounded, and every shift is taken from the same one, so its rounding cancels: it is
`excess`, known exactly, in the sums as in the results.
"""

import triton
import triton.language as tl

from fastppo.kernels.tile import (
    ends,
    is_whole,
    load_last,
    load_tile,
    load_words,
    on_boundary,
    split_row,
    values,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
# Shifts are held above this: 2 to it is 0, and 0 times it is 0 where 0 * -inf is NaN.
LEAST_SHIFT = tl.constexpr(-1e4)
# Of a much larger reference the excess would overflow an exponential. Two logits of this size
# differ by 64 at least in the exponent, at any scale: only the largest count, as at this scale.
FAR = tl.constexpr(1073741824.0)
MASKED = tl.constexpr(float("-inf"))


@triton.jit
def scalar(value, ON_DEVICE: tl.constexpr):
    """A float that the host knows, or one behind a pointer."""
    if ON_DEVICE:
        value = tl.load(value).to(tl.float32)
    return value


@triton.jit
def row_temperature(temperature, row, KIND: tl.constexpr):
    """KIND: 0 is a float, 1 a pointer to one, 2 a pointer to one a row."""
    if KIND == 2:
        temperature = tl.load(temperature + row).to(tl.float32)
    elif KIND == 1:
        temperature = tl.load(temperature).to(tl.float32)
    return tl.zeros([], tl.float32) + temperature


@triton.jit
def log2_scale_of(tau):
    """log2(e) / tau: what turns a difference of logits into an exponent of 2."""
    return tl.div_rn(tau * 0.0 + LOG2E, tau)


@triton.jit
def lowest(scale):
    """What a maximum starts from: far below every row, but not too far for its own excess."""
    return tl.maximum(tl.div_rn(scale * 0.0 - 1.5 * FAR, scale), LOWEST)


@triton.jit
def held_scale(row_max, log2_scale):
    """The scale, or one that is small enough for a row whose largest logit is far."""
    is_far = tl.abs(row_max) * log2_scale > FAR
    return tl.where(is_far, (row_max * 0.0 + FAR) / tl.abs(row_max), log2_scale)


@triton.jit
def next_scale(row_max, scale, log2_scale):
    """The scale at which a row should have been swept, as far as one at `scale` could tell.

    Where all logits are below `lowest`, one at which the lowest float is not.
    """
    return tl.where(
        row_max <= lowest(scale), FAR / (2.0 * -LOWEST), held_scale(row_max, log2_scale)
    )


@triton.jit
def reference_of(row_max, scale):
    """Their product, rounded: a multiply-add, which no compiler fuses with a later subtraction."""
    return tl.fma(row_max, scale, scale * 0.0)


@triton.jit
def excess_of(row_max, scale):
    """The exponent of a row's largest logit: what its reference has lost by rounding."""
    return tl.fma(row_max, scale, -reference_of(row_max, scale))


@triton.jit
def tanh(y):
    """Odd, and accurate near 0, where the quotient of exponentials cancels."""
    a = tl.abs(y)
    e = tl.exp2(a * (-2.0 * LOG2E))
    quotient = (1 - e) / (1 + e)
    s = a * a
    series = a + a * s * (-0.33333333 + s * (0.13333333 + s * (-0.053968254 + s * 0.021869488)))
    t = tl.where(a < 0.2, series, quotient)
    return tl.where(y < 0, -t, t)


@triton.jit
def apply_softcap(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """u and du/dx; masked vocabulary stays -inf."""
    slope = 1.0
    if HAS_SOFTCAP:
        t = tanh(x / softcap)
        slope = 1.0 - t * t
        x = tl.where(x == MASKED, x, softcap * t)
    return x, slope


@triton.jit
def capped(x, softcap, HAS_SOFTCAP: tl.constexpr):
    u, _ = apply_softcap(x, softcap, HAS_SOFTCAP)
    return u


@triton.jit
def thread_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def thread_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def shifts_of(u, row_max, scale):
    """Exponents of a tile's logits, each from its thread's reference."""
    reference = reference_of(row_max, scale)
    return tl.fma(u, scale, -reference[None, :, None]), reference


@triton.jit
def accumulate(u, row_max, reference, sum_exp2, sum_shift, scale):
    """A thread's sums with a tile more; what they were rescaled by, and the exponentials."""
    row_max = tl.maximum(row_max, thread_max(u))
    shift, new_reference = shifts_of(u, row_max, scale)
    e = tl.exp2(shift)
    moved = reference - new_reference
    rescale = tl.exp2(moved)
    # The product first: what is left of a sum far below is 0, and `moved` may be huge.
    kept = sum_exp2 * rescale
    sum_shift = sum_shift * rescale + moved * kept + thread_sum(e * tl.maximum(shift, LEAST_SHIFT))
    return row_max, new_reference, kept + thread_sum(e), sum_shift, rescale, e


@triton.jit
def accumulate_sum_exp2(u, row_max, reference, sum_exp2, scale):
    """Without the entropy."""
    row_max = tl.maximum(row_max, thread_max(u))
    shift, new_reference = shifts_of(u, row_max, scale)
    rescale = tl.exp2(reference - new_reference)
    return row_max, new_reference, sum_exp2 * rescale + thread_sum(tl.exp2(shift))


@triton.jit
def load_ends(ptr, head, count, V, POLICY: tl.constexpr):
    """The logits in head and rest, -inf in lanes that have none."""
    at, inside = ends(head, count, V, 128 // ptr.dtype.element_ty.primitive_bitwidth)
    x = tl.load(ptr + at, mask=inside, other=MASKED, eviction_policy=POLICY)
    return x.to(tl.float32)


@triton.jit
def sums_of_ends(u, scale):
    """row_max, sum_exp2 and sum_shift of the logits in head and rest, and the exponentials."""
    row_max = tl.maximum(tl.max(u, 0), lowest(scale))
    shift = tl.fma(u, scale, -reference_of(row_max, scale))
    e = tl.exp2(shift)
    return row_max, tl.sum(e, 0), tl.sum(e * tl.maximum(shift, LEAST_SHIFT), 0), e


@triton.jit
def at_first(value, otherwise, THREADS: tl.constexpr):
    """The first thread's sums begin with those of the row's ends."""
    return tl.where(tl.arange(0, THREADS) == 0, value, otherwise + tl.zeros([THREADS], tl.float32))


@triton.jit
def merge_threads(row_max, reference, sum_exp2, sum_shift, scale):
    """row_max, sum_exp2 and sum_shift of the whole row."""
    top = tl.max(row_max, 0)
    moved = reference - reference_of(top, scale)
    e = tl.exp2(moved)
    kept = sum_exp2 * e
    return top, tl.sum(kept, 0), tl.sum(sum_shift * e + moved * kept, 0)


@triton.jit
def accumulate_words(
    words,
    row_max,
    reference,
    sum_exp2,
    sum_shift,
    softcap,
    scale,
    TYPE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """A thread's sums with a tile more, as it lies in memory."""
    u = capped(values(words, TYPE), softcap, HAS_SOFTCAP)
    row_max, reference, sum_exp2, sum_shift, _rescale, _e = accumulate(
        u, row_max, reference, sum_exp2, sum_shift, scale
    )
    return row_max, reference, sum_exp2, sum_shift


@triton.jit
def sweep(
    row_ptr,
    words,
    V,
    softcap,
    scale,
    HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    METHOD: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """row_max, sum_exp2 and sum_shift of one row, read front to back and wanted again.

    METHOD: "tiles" loads a tile and computes it; "ahead" loads the next one before it computes a
    tile; "held" has all of the row in `words`.
    """
    TYPE: tl.constexpr = row_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // TYPE.primitive_bitwidth
    ROUND: tl.constexpr = THREADS * VECTOR
    TILE: tl.constexpr = TILES * ROUND
    head, count = split_row(row_ptr, V, ALIGNED)
    row_max = lowest(scale) + tl.zeros([THREADS], tl.float32)
    sum_exp2 = tl.zeros([THREADS], tl.float32)
    sum_shift = tl.zeros([THREADS], tl.float32)
    if not ALIGNED:
        x_ends = load_ends(row_ptr, head, count, V, "evict_last")
        u_ends = capped(x_ends, softcap, HAS_SOFTCAP)
        end_max, end_sum, end_shift, _end_exp = sums_of_ends(u_ends, scale)
        row_max = at_first(end_max, lowest(scale), THREADS)
        sum_exp2 = at_first(end_sum, 0.0, THREADS)
        sum_shift = at_first(end_shift, 0.0, THREADS)
    reference = reference_of(row_max, scale)
    whole_ptr = on_boundary(row_ptr, head, ALIGNED)
    full = count // TILE * TILE
    if METHOD == "held":
        full = count
        row_max, reference, sum_exp2, sum_shift = accumulate_words(
            words, row_max, reference, sum_exp2, sum_shift, softcap, scale, TYPE, HAS_SOFTCAP
        )
    elif METHOD == "ahead":
        if full > 0:
            near = load_words(whole_ptr, TILES, THREADS, "evict_last")
            # Two tiles a turn, so that none is copied from one register to another.
            for start in range(TILE, full - TILE, 2 * TILE):
                far = load_words(whole_ptr + start, TILES, THREADS, "evict_last")
                row_max, reference, sum_exp2, sum_shift = accumulate_words(
                    near, row_max, reference, sum_exp2, sum_shift, softcap, scale, TYPE, HAS_SOFTCAP
                )
                near = load_words(whole_ptr + start + TILE, TILES, THREADS, "evict_last")
                row_max, reference, sum_exp2, sum_shift = accumulate_words(
                    far, row_max, reference, sum_exp2, sum_shift, softcap, scale, TYPE, HAS_SOFTCAP
                )
            row_max, reference, sum_exp2, sum_shift = accumulate_words(
                near, row_max, reference, sum_exp2, sum_shift, softcap, scale, TYPE, HAS_SOFTCAP
            )
            if full // TILE % 2 == 0:
                far = load_words(whole_ptr + full - TILE, TILES, THREADS, "evict_last")
                row_max, reference, sum_exp2, sum_shift = accumulate_words(
                    far, row_max, reference, sum_exp2, sum_shift, softcap, scale, TYPE, HAS_SOFTCAP
                )
    else:
        for start in range(0, full, TILE):
            x = load_tile(whole_ptr + start, TILES, THREADS, "evict_last")
            u = capped(x, softcap, HAS_SOFTCAP)
            row_max, reference, sum_exp2, sum_shift, _rescale, _e = accumulate(
                u, row_max, reference, sum_exp2, sum_shift, scale
            )
    for start in range(full, count, ROUND):
        inside = is_whole(start, count, THREADS, VECTOR)
        x = load_last(whole_ptr + start, inside, THREADS, "evict_last")
        u = capped(x, softcap, HAS_SOFTCAP)
        row_max, reference, sum_exp2, sum_shift, _rescale, _e = accumulate(
            u, row_max, reference, sum_exp2, sum_shift, scale
        )
    return merge_threads(row_max, reference, sum_exp2, sum_shift, scale)


@triton.jit
def row_statistics(
    row_ptr,
    words,
    V,
    softcap,
    log2_scale,
    HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    METHOD: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """row_max, sum_exp and the mean of shift; further sweeps of a row whose logits are far."""
    scale = log2_scale
    held = log2_scale
    row_max = log2_scale * 0.0
    sum_exp2 = log2_scale * 0.0
    sum_shift = log2_scale * 0.0
    sweeps = 0
    while sweeps < 3:
        scale = held
        row_max, sum_exp2, sum_shift = sweep(
            row_ptr, words, V, softcap, scale, HAS_SOFTCAP, ALIGNED, METHOD, TILES, THREADS
        )
        held = next_scale(row_max, scale, log2_scale)
        sweeps = tl.where(held == scale, 3, sweeps + 1)
    return to_row_max(row_max, sum_exp2, sum_shift, scale)


@triton.jit
def to_row_max(row_max, sum_exp2, sum_shift, scale):
    """Sum and mean shift taken from the largest logit itself, not from its rounded reference."""
    excess = excess_of(row_max, scale)
    mean_shift = tl.div_rn(sum_shift, tl.where(sum_exp2 == 0, 1.0, sum_exp2)) - excess
    # Divided, so that one logit alone has the sum 1.
    return row_max, tl.div_rn(sum_exp2, tl.exp2(excess)), mean_shift


@triton.jit
def sampled_logit(row_ptr, token, V, softcap, HAS_SOFTCAP: tl.constexpr):
    """u of the sampled token; NaN for one that is no word, so that it shows.

    It is loaded before the first sweep, whose reductions are the barrier between this load and the
    stores of a gradient in place.
    """
    known = (token >= 0) & (token < V)
    x = tl.load(row_ptr + tl.where(known, token, 0), mask=known, other=float("nan")).to(tl.float32)
    u = capped(x, softcap, HAS_SOFTCAP)
    return u


@triton.jit
def finish_statistics(u_sampled, row_max, sum_exp, mean_shift, tau):
    """Log-prob and entropy in nats, and log sum_exp; a row of masked vocabulary has -inf and 0."""
    log_sum_exp = tl.log(tl.where(sum_exp == 0, 1.0, sum_exp))
    # Divisions by the temperature are rounded as torch's: large log ratios are made of these.
    logprob = tl.div_rn(u_sampled - row_max, tau) - log_sum_exp
    entropy = tl.where(sum_exp == 0, 0.0, log_sum_exp - mean_shift * LN2)
    return tl.where(sum_exp == 0, MASKED, logprob), entropy, log_sum_exp


@triton.jit
def row_logprob(
    row_ptr,
    words,
    token,
    V,
    softcap,
    tau,
    HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    METHOD: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Log-prob of the sampled token and entropy of a row; its row_max and sum_exp."""
    u = sampled_logit(row_ptr, token, V, softcap, HAS_SOFTCAP)
    scale = log2_scale_of(tau)
    row_max, sum_exp, mean_shift = row_statistics(
        row_ptr, words, V, softcap, scale, HAS_SOFTCAP, ALIGNED, METHOD, TILES, THREADS
    )
    logprob, entropy, _ = finish_statistics(u, row_max, sum_exp, mean_shift, tau)
    return logprob, entropy, row_max, sum_exp
