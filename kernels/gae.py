"""GAE of packed sequences: one program a sequence, read backwards.

A_t = delta_t + decay * A_{t+1} is linear: a pair (factor, value) a token, composed by a scan within
a block and carried over to the block before it in time. The scan itself runs forward: lane 0 is a
block's last token. Triton's own reverse=True is reported wrong on GPUs for pairs that do not
commute (triton-lang/triton issues 4362 and 8412), which its interpreter does not show.
"""

import triton
import triton.language as tl

from fastppo.kernels.compilation import kernel
from fastppo.kernels.whiten import block_moments, merge, merged_moments, whitened


@triton.jit
def backwards(start, stop, BLOCK: tl.constexpr):
    """Places before `stop` from the last one back, counted from `stop`; and which are in it."""
    at = -1 - tl.arange(0, BLOCK)
    return at, at >= start - stop


@triton.jit
def compose(later_factor, later_value, factor, value):
    """A step after what comes later in time, and in an earlier lane."""
    return later_factor * factor, value + factor * later_value


@triton.jit
def scan_block(delta, live, decay, carry, BLOCK: tl.constexpr):
    """Advantages of a block read backwards, and that of its last lane: the next block's carry."""
    # Lanes that are not live are a sequence's last ones: nothing comes after them.
    factor = tl.where(live, decay + delta * 0.0, 1.0)
    factor, value = tl.associative_scan((factor, delta), 0, compose)
    advantage = value + factor * carry
    last = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, advantage, 0.0), 0)
    return advantage, last


@kernel("reward_parts", "parts")
def gae_kernel(
    reward_ptr,
    reward_part_ptr,
    value_ptr,
    offsets_ptr,
    bootstrap_ptr,
    advantage_ptr,
    return_ptr,
    part_ptr,
    gamma,
    lam,
    reward_parts,
    parts,
    BLOCK: tl.constexpr,
):
    """Advantages, returns and, unless `part_ptr` is None, the moments of a sequence's advantages.

    With `reward_part_ptr` the rewards are first scaled to variance 1 by these moments, in place.
    """
    sequence = tl.program_id(0)
    start = tl.load(offsets_ptr + sequence).to(tl.int64)
    end = tl.load(offsets_ptr + sequence + 1).to(tl.int64)
    after = 0.0
    if bootstrap_ptr is not None:
        after = tl.load(bootstrap_ptr + sequence).to(tl.float32)
    if reward_part_ptr is not None:
        reward_count, reward_mean, reward_m2 = merged_moments(reward_part_ptr, reward_parts, BLOCK)
    carry = 0.0
    count = 0.0
    mean = 0.0
    m2 = 0.0
    blocks = ((end - start + BLOCK - 1) // BLOCK).to(tl.int32)
    stop = end
    for _ in range(0, blocks):
        at, live = backwards(start, stop, BLOCK)
        reward = tl.load(reward_ptr + stop + at, mask=live, other=0.0).to(tl.float32)
        if reward_part_ptr is not None:
            reward = whitened(reward, reward_count, reward_mean, reward_m2, False)
            tl.store(reward_ptr + stop + at, reward, mask=live)
        value = tl.load(value_ptr + stop + at, mask=live, other=0.0).to(tl.float32)
        following = tl.load(value_ptr + stop + at + 1, mask=live & (at + 1 < end - stop), other=0.0)
        following = tl.where(at + 1 == end - stop, after, following.to(tl.float32))
        delta = tl.where(live, reward + gamma * following - value, 0.0)
        advantage, carry = scan_block(delta, live, gamma * lam, carry, BLOCK)
        tl.store(advantage_ptr + stop + at, advantage, mask=live)
        tl.store(return_ptr + stop + at, advantage + value, mask=live)
        if part_ptr is not None:
            more_count, more_mean, more_m2 = block_moments(advantage, live)
            count, mean, m2 = merge(count, mean, m2, more_count, more_mean, more_m2)
        stop -= BLOCK
    if part_ptr is not None:
        tl.store(part_ptr + sequence, count)
        tl.store(part_ptr + parts + sequence, mean)
        tl.store(part_ptr + 2 * parts + sequence, m2)
