"""One row of logits: its normaliser and entropy in one sweep, its gradient in the next.

    z = u / tau with u = x, or softcap * tanh(x / softcap);  p = softmax(z)
    highest = max u,  total = sum exp((u - highest) / tau),  weighted = sum (u - highest) exp(...)

Exponents are taken of differences of logits, before the temperature: the difference of two close
floats is exact, that of their rounded multiples is not.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
# Differences are held within +-FAR: its exponential is 0, and 0 * FAR is 0 where 0 * inf is NaN.
FAR = tl.constexpr(1e30)
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
def bits_of(tau):
    """log2(e) / tau: what turns a difference of logits into an exponent of 2."""
    return tl.div_rn(tau * 0.0 + LOG2E, tau)


@triton.jit
def tanh(y):
    """Odd, and accurate near 0, where the quotient of exponentials cancels."""
    a = tl.abs(y)
    e = tl.exp2(a * (-2.0 * LOG2E))
    far = (1 - e) / (1 + e)
    s = a * a
    near = a + a * s * (-0.33333333 + s * (0.13333333 + s * (-0.053968254 + s * 0.021869488)))
    t = tl.where(a < 0.2, near, far)
    return tl.where(y < 0, -t, t)


@triton.jit
def bend(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """u and du/dx; masked vocabulary stays -inf."""
    slope = 1.0
    if HAS_SOFTCAP:
        t = tanh(x / softcap)
        slope = 1.0 - t * t
        x = tl.where(x == MASKED, x, softcap * t)
    return x, slope


@triton.jit
def accumulate(u, highest, total, weighted, bits):
    """Each lane's running highest, total and weighted, one more logit a lane; one exponential.

    Also what a sum weighted by the exponentials is multiplied by, and what the new logit weighs.
    """
    d = tl.clamp(u - highest, -FAR, FAR, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(-tl.abs(d) * bits)
    up = d > 0
    weighted = tl.where(up, (weighted - d * total) * e, weighted + d * e)
    keep = tl.where(up, e, 1.0)
    new = tl.where(up, 1.0, e)
    return tl.where(up, u, highest), total * keep + new, weighted, keep, new


@triton.jit
def accumulate_total(u, highest, total, bits):
    """Highest and total alone: without a product of d nothing has to hold its infinities."""
    d = u - highest
    e = tl.exp2(-tl.abs(d) * bits)
    up = d > 0
    return tl.where(up, u, highest), tl.where(up, total * e + 1.0, total + e)


@triton.jit
def merge_lanes(highest, total, weighted, bits):
    """Highest, total and weighted of the whole row."""
    top = tl.max(highest, 0)
    d = tl.maximum(highest - top, -FAR)
    e = tl.exp2(d * bits)
    return top, tl.sum(total * e, 0), tl.sum((weighted + d * total) * e, 0)


@triton.jit
def row_statistics(row_ptr, V, softcap, bits, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """highest, total and weighted of one row, read front to back and wanted again."""
    lane = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        x = tl.load(row_ptr + start + lane, eviction_policy="evict_last").to(tl.float32)
        u, _ = bend(x, softcap, HAS_SOFTCAP)
        highest, total, weighted, _, _ = accumulate(u, highest, total, weighted, bits)
    if full < V:
        at = full + lane
        x = tl.load(row_ptr + at, mask=at < V, other=MASKED, eviction_policy="evict_last")
        u, _ = bend(x.to(tl.float32), softcap, HAS_SOFTCAP)
        highest, total, weighted, _, _ = accumulate(u, highest, total, weighted, bits)
    return merge_lanes(highest, total, weighted, bits)


@triton.jit
def sampled_logit(row_ptr, token, V, softcap, HAS_SOFTCAP: tl.constexpr):
    """u of the sampled token; NaN for one that is no word, so that it shows.

    It is loaded before the first sweep, whose reductions are the barrier between this load and the
    stores of a gradient in place.
    """
    known = (token >= 0) & (token < V)
    x = tl.load(row_ptr + tl.where(known, token, 0), mask=known, other=float("nan")).to(tl.float32)
    u, _ = bend(x, softcap, HAS_SOFTCAP)
    return u


@triton.jit
def finish_statistics(u_sampled, highest, total, weighted, tau):
    """Log-prob and entropy in nats, and log total; a row of masked vocabulary has -inf and 0."""
    some = tl.where(total == 0, 1.0, total)
    log_total = tl.log(some)
    # Divisions by the temperature are rounded as torch's: large log ratios are made of these.
    logprob = tl.div_rn(u_sampled - highest, tau) - log_total
    entropy = log_total - tl.div_rn(tl.div_rn(weighted, some), tau)
    return tl.where(total == 0, MASKED, logprob), entropy, log_total


@triton.jit
def gradient_block(
    x,
    at,
    token,
    highest,
    inv_total,
    g,
    a,
    b,
    softcap,
    bits,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """dL/dx of a block: g at the sampled token, less p (a + b (u - highest))."""
    u, slope = bend(x, softcap, HAS_SOFTCAP)
    d = tl.maximum(u - highest, -FAR, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(d * bits) * inv_total
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
    highest,
    total,
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
    some = tl.where(total == 0, 1.0, total)
    inv_total = tl.div_rn(some * 0.0 + 1.0, some)
    # dL/dz_v = g (1[v = token] - p_v) - h p_v (log p_v + H)
    # with log p_v = (u_v - highest) / tau - log total
    bits = bits_of(tau)
    a = tl.div_rn(g + h * (entropy - tl.log(some)), tau)
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
            highest,
            inv_total,
            g,
            a,
            b,
            softcap,
            bits,
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
            highest,
            inv_total,
            g,
            a,
            b,
            softcap,
            bits,
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
