"""KL to the reference from the sampled token alone, and its slope."""

import triton
import triton.language as tl

from fastppo.kernels.compilation import kernel


@triton.jit
def expm1_minus_arg(e):
    """exp(e) - 1 - e; by its series near 0, where the difference cancels."""
    series = 1.0 + e / 3 * (
        1.0 + e / 4 * (1.0 + e / 5 * (1.0 + e / 6 * (1.0 + e / 7 * (1.0 + e / 8 * (1.0 + e / 9)))))
    )
    return tl.where(tl.abs(e) < 0.5, e * e / 2 * series, tl.exp(e) - 1.0 - e)


@triton.jit
def kl_and_slope(logprob, ref, limit, KIND: tl.constexpr):
    """k and dk/dlogprob; both 0 where the sampled token is masked vocabulary (logprob -inf)."""
    masked = logprob == float("-inf")
    diff = tl.where(masked, 0.0, logprob - ref)
    if KIND == "k1":
        kl = diff
        slope = diff * 0.0 + 1.0
    elif KIND == "abs":
        kl = tl.abs(diff)
        slope = tl.where(diff > 0, 1.0, tl.where(diff < 0, -1.0, diff * 0.0))
    elif KIND == "k2":
        kl = diff * diff / 2
        slope = diff
    else:
        e = tl.clamp(-diff, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        kl = expm1_minus_arg(e)
        slope = tl.where(tl.abs(diff) <= limit, -(kl + e), 0.0)
    return kl, tl.where(masked, 0.0, slope)


@kernel("n")
def token_kl_kernel(
    logprob_ptr, ref_ptr, kl_ptr, slope_ptr, limit, n, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a block of tokens."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    logprob = tl.load(logprob_ptr + at, mask=live, other=0.0).to(tl.float32)
    ref = tl.load(ref_ptr + at, mask=live, other=0.0).to(tl.float32)
    kl, slope = kl_and_slope(logprob, ref, limit, KIND)
    tl.store(kl_ptr + at, kl, mask=live)
    tl.store(slope_ptr + at, slope, mask=live)
