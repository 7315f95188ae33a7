"""KL-shaped rewards, GAE, returns and moments of packed sequences: one program a sequence."""

import triton.language as tl

from fastppo.kernels.compilation import kernel
from fastppo.kernels.gae import backwards, scan_block
from fastppo.kernels.row import scalar
from fastppo.kernels.token_kl import kl_and_slope
from fastppo.kernels.whiten import block_moments, merge


@kernel("parts")
def advantages_kernel(
    score_ptr,
    logprob_ptr,
    ref_ptr,
    exact_kl_ptr,
    extra_ptr,
    value_ptr,
    offsets_ptr,
    bootstrap_ptr,
    kl_coef,
    advantage_ptr,
    return_ptr,
    reward_ptr,
    kl_ptr,
    part_ptr,
    limit,
    gamma,
    lam,
    parts,
    KL_KIND: tl.constexpr,
    KL_COEF_ON_DEVICE: tl.constexpr,
    REWARDS_ONLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All of it in one launch; with REWARDS_ONLY rewards, KL and the moments of the rewards."""
    sequence = tl.program_id(0)
    start = tl.load(offsets_ptr + sequence).to(tl.int64)
    end = tl.load(offsets_ptr + sequence + 1).to(tl.int64)
    score = tl.load(score_ptr + sequence).to(tl.float32)
    beta = scalar(kl_coef, KL_COEF_ON_DEVICE)
    after = 0.0
    if bootstrap_ptr is not None:
        after = tl.load(bootstrap_ptr + sequence).to(tl.float32)
    carry = 0.0
    count = 0.0
    mean = 0.0
    m2 = 0.0
    blocks = ((end - start + BLOCK - 1) // BLOCK).to(tl.int32)
    stop = end
    for _ in range(0, blocks):
        at, live = backwards(start, stop, BLOCK)
        if exact_kl_ptr is not None:
            kl = tl.load(exact_kl_ptr + stop + at, mask=live, other=0.0).to(tl.float32)
        else:
            logprob = tl.load(logprob_ptr + stop + at, mask=live, other=0.0).to(tl.float32)
            ref = tl.load(ref_ptr + stop + at, mask=live, other=0.0).to(tl.float32)
            kl, _slope = kl_and_slope(logprob, ref, limit, KL_KIND)
        reward = -beta * kl
        if extra_ptr is not None:
            reward += tl.load(extra_ptr + stop + at, mask=live, other=0.0).to(tl.float32)
        reward = tl.where(at + 1 == end - stop, reward + score, reward)
        tl.store(kl_ptr + stop + at, kl, mask=live)
        tl.store(reward_ptr + stop + at, reward, mask=live)
        counted = reward
        if not REWARDS_ONLY:
            value = tl.load(value_ptr + stop + at, mask=live, other=0.0).to(tl.float32)
            following = tl.load(
                value_ptr + stop + at + 1, mask=live & (at + 1 < end - stop), other=0.0
            )
            following = tl.where(at + 1 == end - stop, after, following.to(tl.float32))
            delta = tl.where(live, reward + gamma * following - value, 0.0)
            counted, carry = scan_block(delta, live, gamma * lam, carry, BLOCK)
            tl.store(advantage_ptr + stop + at, counted, mask=live)
            tl.store(return_ptr + stop + at, counted + value, mask=live)
        more_count, more_mean, more_m2 = block_moments(counted, live)
        count, mean, m2 = merge(count, mean, m2, more_count, more_mean, more_m2)
        stop -= BLOCK
    tl.store(part_ptr + sequence, count)
    tl.store(part_ptr + parts + sequence, mean)
    tl.store(part_ptr + 2 * parts + sequence, m2)
