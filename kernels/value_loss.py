"""The critic's clipped loss, its gradient and its sums, a block of tokens a program."""

import triton.language as tl

from fastppo.kernels.compilation import kernel


@kernel("n", "parts")
def value_loss_kernel(
    value_ptr,
    old_ptr,
    return_ptr,
    weight_ptr,
    grad_ptr,
    part_ptr,
    clip,
    n,
    parts,
    HAS_CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`part_ptr` is (7, parts): the sums of ValueMetrics in their order, the loss last."""
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    live = inside & (weight != 0)
    value = tl.load(value_ptr + at, mask=live, other=0.0).to(tl.float32)
    old = tl.load(old_ptr + at, mask=live, other=0.0).to(tl.float32)
    target = tl.load(return_ptr + at, mask=live, other=0.0).to(tl.float32)
    error = (value - target) * (value - target)
    larger_error = error
    slope = value - target
    clipped = tl.zeros([BLOCK], tl.float32)
    if HAS_CLIP:
        clipped_value = tl.clamp(value, old - clip, old + clip, propagate_nan=tl.PropagateNan.ALL)
        clipped_error = (clipped_value - target) * (clipped_value - target)
        is_clipped = live & (clipped_error > error)
        larger_error = tl.where(is_clipped, clipped_error, error)
        # Where the clipped error is the larger one, the value was clipped: no gradient.
        slope = tl.where(is_clipped, 0.0, slope)
        clipped = is_clipped.to(tl.float32)
    tl.store(grad_ptr + at, tl.where(live, weight * slope, 0.0), mask=inside)
    tl.store(part_ptr + block, tl.sum(live.to(tl.float32), 0))
    tl.store(part_ptr + parts + block, tl.sum(clipped, 0))
    tl.store(part_ptr + 2 * parts + block, tl.sum(error, 0))
    tl.store(part_ptr + 3 * parts + block, tl.sum(value, 0))
    tl.store(part_ptr + 4 * parts + block, tl.sum(target, 0))
    tl.store(part_ptr + 5 * parts + block, tl.sum(target * target, 0))
    tl.store(part_ptr + 6 * parts + block, tl.sum(weight * larger_error, 0) / 2)
