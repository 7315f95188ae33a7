"""Moments in two stages, merged in one order, and whitening with them."""

import triton
import triton.language as tl

from fastppo.kernels.compilation import kernel

EPS = tl.constexpr(1e-8)  # inside the root, as in TRL


@triton.jit
def block_moments(x, live):
    """Count, mean and sum of squared deviations of a block's live lanes."""
    x = tl.where(live, x, 0.0)
    count = tl.sum(live.to(tl.float32), 0)
    mean = tl.sum(x, 0) / tl.maximum(count, 1.0)
    d = tl.where(live, x - mean, 0.0)
    return count, mean, tl.sum(d * d, 0)


@triton.jit
def merge(count, mean, m2, more_count, more_mean, more_m2):
    """Moments of two sets together (Chan, Golub, LeVeque 1979)."""
    both = count + more_count
    share = more_count / tl.maximum(both, 1.0)
    delta = more_mean - mean
    return both, mean + delta * share, m2 + more_m2 + delta * delta * count * share


@triton.jit
def merged_moments(part_ptr, parts, BLOCK: tl.constexpr):
    """The moments of all parts, (3, parts): each program that wants them does the same sums."""
    lane = tl.arange(0, BLOCK)
    count = 0.0
    mean = 0.0
    m2 = 0.0
    for start in range(0, parts, BLOCK):
        at = start + lane
        live = at < parts
        counts = tl.load(part_ptr + at, mask=live, other=0.0)
        means = tl.load(part_ptr + parts + at, mask=live, other=0.0)
        m2s = tl.load(part_ptr + 2 * parts + at, mask=live, other=0.0)
        some = tl.sum(counts, 0)
        middle = tl.sum(counts * means, 0) / tl.maximum(some, 1.0)
        d = means - middle
        spread = tl.sum(m2s + counts * d * d, 0)
        count, mean, m2 = merge(count, mean, m2, some, middle, spread)
    return count, mean, m2


@triton.jit
def whitened(x, count, mean, m2, SHIFT_MEAN: tl.constexpr):
    variance = tl.where(count > 1, m2 / tl.maximum(count - 1, 1.0), 0.0)
    y = (x - mean) * (1.0 / tl.sqrt(variance + EPS))
    return y if SHIFT_MEAN else y + mean


@kernel("n", "parts")
def moments_kernel(x_ptr, weight_ptr, part_ptr, n, parts, BLOCK: tl.constexpr):
    """Moments of each block of tokens; `weight_ptr` may be None: all count."""
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    if weight_ptr is not None:
        live = live & (tl.load(weight_ptr + at, mask=live, other=0).to(tl.float32) != 0)
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    count, mean, m2 = block_moments(x, live)
    tl.store(part_ptr + block, count)
    tl.store(part_ptr + parts + block, mean)
    tl.store(part_ptr + 2 * parts + block, m2)


@kernel("parts")
def merge_moments_kernel(part_ptr, out_ptr, parts, BLOCK: tl.constexpr):
    """One program: (count, mean, m2) of all parts."""
    count, mean, m2 = merged_moments(part_ptr, parts, BLOCK)
    tl.store(out_ptr, count)
    tl.store(out_ptr + 1, mean)
    tl.store(out_ptr + 2, m2)


@kernel("n", "parts")
def whiten_kernel(
    x_ptr,
    weight_ptr,
    part_ptr,
    y_ptr,
    n,
    parts,
    SHIFT_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = (x - mean) / sqrt(variance + eps) of a block, 0 where the weight is 0."""
    count, mean, m2 = merged_moments(part_ptr, parts, BLOCK)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    if weight_ptr is not None:
        live = live & (tl.load(weight_ptr + at, mask=live, other=0).to(tl.float32) != 0)
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    y = whitened(x, count, mean, m2, SHIFT_MEAN)
    tl.store(y_ptr + at, tl.where(live, y, 0.0), mask=at < n)
