"""One row of logits: its normaliser and entropy in one sweep, its gradient in the next.

    z = u / tau with u = x, or softcap * tanh(x / softcap);  p = softmax(z)
    row_max = max u,  sum_exp = sum exp((u - row_max) / tau),
    sum_shifted_exp = sum (u - row_max) exp((u - row_max) / tau)

Exponents are taken of differences of logits, before the temperature: the difference of two close
floats is exact, that of their rounded multiples is not.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
# Shifted logits, u - row_max, are held within +-MAX_SHIFT: its exponential is 0, and 0 * MAX_SHIFT
# is 0 where 0 * inf is NaN.
MAX_SHIFT = tl.constexpr(1e30)
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
def accumulate(u, row_max, sum_exp, sum_shifted_exp, log2_scale):
    """Each lane's row_max, sum_exp and sum_shifted_exp with one more logit; one exponential.

    Also what a sum weighted by the exponentials is multiplied by, and what the new logit weighs.
    """
    d = tl.clamp(u - row_max, -MAX_SHIFT, MAX_SHIFT, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(-tl.abs(d) * log2_scale)
    is_new_max = d > 0
    sum_shifted_exp = tl.where(
        is_new_max, (sum_shifted_exp - d * sum_exp) * e, sum_shifted_exp + d * e
    )
    rescale = tl.where(is_new_max, e, 1.0)
    new_exp = tl.where(is_new_max, 1.0, e)
    return (
        tl.where(is_new_max, u, row_max),
        sum_exp * rescale + new_exp,
        sum_shifted_exp,
        rescale,
        new_exp,
    )


@triton.jit
def accumulate_sum_exp(u, row_max, sum_exp, log2_scale):
    """row_max and sum_exp alone: without a product of d nothing has to hold its infinities."""
    d = u - row_max
    e = tl.exp2(-tl.abs(d) * log2_scale)
    is_new_max = d > 0
    return tl.where(is_new_max, u, row_max), tl.where(is_new_max, sum_exp * e + 1.0, sum_exp + e)


@triton.jit
def merge_lanes(row_max, sum_exp, sum_shifted_exp, log2_scale):
    """row_max, sum_exp and sum_shifted_exp of the whole row."""
    top = tl.max(row_max, 0)
    d = tl.maximum(row_max - top, -MAX_SHIFT)
    e = tl.exp2(d * log2_scale)
    return top, tl.sum(sum_exp * e, 0), tl.sum((sum_shifted_exp + d * sum_exp) * e, 0)


@triton.jit
def row_statistics(row_ptr, V, softcap, log2_scale, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """row_max, sum_exp and sum_shifted_exp of one row, read front to back and wanted again."""
    lane = tl.arange(0, BLOCK)
    row_max = tl.full([BLOCK], LOWEST, tl.float32)
    sum_exp = tl.zeros([BLOCK], tl.float32)
    sum_shifted_exp = tl.zeros([BLOCK], tl.float32)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        x = tl.load(row_ptr + start + lane, eviction_policy="evict_last").to(tl.float32)
        u, _ = apply_softcap(x, softcap, HAS_SOFTCAP)
        row_max, sum_exp, sum_shifted_exp, _, _ = accumulate(
            u, row_max, sum_exp, sum_shifted_exp, log2_scale
        )
    if full < V:
        at = full + lane
        x = tl.load(row_ptr + at, mask=at < V, other=MASKED, eviction_policy="evict_last")
        u, _ = apply_softcap(x.to(tl.float32), softcap, HAS_SOFTCAP)
        row_max, sum_exp, sum_shifted_exp, _, _ = accumulate(
            u, row_max, sum_exp, sum_shifted_exp, log2_scale
        )
    return merge_lanes(row_max, sum_exp, sum_shifted_exp, log2_scale)


@triton.jit
def sampled_logit(row_ptr, token, V, softcap, HAS_SOFTCAP: tl.constexpr):
    """u of the sampled token; NaN for one that is no word, so that it shows.

    It is loaded before the first sweep, whose reductions are the barrier between this load and the
    stores of a gradient in place.
    """
    known = (token >= 0) & (token < V)
    x = tl.load(row_ptr + tl.where(known, token, 0), mask=known, other=float("nan")).to(tl.float32)
    u, _ = apply_softcap(x, softcap, HAS_SOFTCAP)
    return u


@triton.jit
def finish_statistics(u_sampled, row_max, sum_exp, sum_shifted_exp, tau):
    """Log-prob and entropy in nats, and log sum_exp; a row of masked vocabulary has -inf and 0."""
    safe_sum_exp = tl.where(sum_exp == 0, 1.0, sum_exp)
    log_sum_exp = tl.log(safe_sum_exp)
    # Divisions by the temperature are rounded as torch's: large log ratios are made of these.
    logprob = tl.div_rn(u_sampled - row_max, tau) - log_sum_exp
    entropy = log_sum_exp - tl.div_rn(tl.div_rn(sum_shifted_exp, safe_sum_exp), tau)
    return tl.where(sum_exp == 0, MASKED, logprob), entropy, log_sum_exp


@triton.jit
def gradient_block(
    x,
    at,
    token,
    row_max,
    inv_sum_exp,
    g,
    a,
    b,
    softcap,
    log2_scale,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """dL/dx of a block: g at the sampled token, less p (a + b (u - row_max))."""
    u, slope = apply_softcap(x, softcap, HAS_SOFTCAP)
    d = tl.maximum(u - row_max, -MAX_SHIFT, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(d * log2_scale) * inv_sum_exp
    inner = a
    if HAS_ENTROPY:
        inner = a + b * d
    dx = tl.where(at == token, g, 0.0) - p * inner
    if HAS_SOFTCAP:
        # The slope of masked vocabulary is that of the asymptote, 0, and its p is 0.
        dx = dx * slope
    return dx


@triton.jit
def write_gradient(
    row_ptr,
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
    BLOCK: tl.constexpr,
):
    """The gradient of one row for g = dL/dlogprob and h = dL/dentropy; may overwrite the row.

    Back to front: what the first sweep read last is still in the caches.
    """
    lane = tl.arange(0, BLOCK)
    safe_sum_exp = tl.where(sum_exp == 0, 1.0, sum_exp)
    inv_sum_exp = tl.div_rn(safe_sum_exp * 0.0 + 1.0, safe_sum_exp)
    # dL/dz_v = g (1[v = token] - p_v) - h p_v (log p_v + H)
    # with log p_v = (u_v - row_max) / tau - log sum_exp
    log2_scale = log2_scale_of(tau)
    a = tl.div_rn(g + h * (entropy - tl.log(safe_sum_exp)), tau)
    b = tl.div_rn(h, tau * tau)
    g = tl.div_rn(g, tau)
    token = token.to(tl.int32)  # a comparison of 64 bits costs two instructions a logit
    full = V // BLOCK * BLOCK
    if full < V:
        at = full + lane
        x = tl.load(row_ptr + at, mask=at < V, other=MASKED, eviction_policy="evict_first")
        dx = gradient_block(
            x.to(tl.float32),
            at,
            token,
            row_max,
            inv_sum_exp,
            g,
            a,
            b,
            softcap,
            log2_scale,
            HAS_SOFTCAP,
            HAS_ENTROPY,
        )
        dx = dx.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, dx, mask=at < V, eviction_policy="evict_first")
    for back in range(BLOCK, full + 1, BLOCK):
        at = full - back + lane
        x = tl.load(row_ptr + at, eviction_policy="evict_first").to(tl.float32)
        dx = gradient_block(
            x,
            at,
            token,
            row_max,
            inv_sum_exp,
            g,
            a,
            b,
            softcap,
            log2_scale,
            HAS_SOFTCAP,
            HAS_ENTROPY,
        )
        tl.store(out_ptr + at, dx.to(out_ptr.dtype.element_ty), eviction_policy="evict_first")


@triton.jit
def fill_zero(out_ptr, V, BLOCK: tl.constexpr):
    """The gradient of a row that takes no part."""
    zero = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    lane = tl.arange(0, BLOCK)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        tl.store(out_ptr + start + lane, zero)
    if full < V:
        tl.store(out_ptr + full + lane, zero, mask=full + lane < V)
