"""Launches of the Triton kernels over tokens and sequences; see `Backend`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.kernels import advantages as advantages_kernels
from fastppo.kernels import gae as gae_kernels
from fastppo.kernels import sums
from fastppo.kernels import token_kl as token_kl_kernels
from fastppo.kernels import value_loss as value_loss_kernels
from fastppo.kernels import whiten as whiten_kernels
from fastppo.ops.backends import AdvantagesArguments, GaeArguments
from fastppo.ops.backends.launch import multiprocessors, start
from fastppo.ops.backends.sizes import ADVANTAGES_SCAN, BLOCK, GAE_SCAN


def sum_rows(x_MN: Tensor, *, maximum: int = -1) -> tuple[Tensor, Tensor]:
    """The sum of the last row, and those of the others (of row `maximum` the largest entry)."""
    rows, n = x_MN.shape
    vector = torch.empty(rows - 1, dtype=torch.float32, device=x_MN.device)
    last = torch.empty((), dtype=torch.float32, device=x_MN.device)
    arguments = (x_MN, vector, last, n, x_MN.stride(0))
    meta = {"MAXIMUM": maximum, "LAST": rows - 1, "BLOCK": 1024}
    start(sums.sum_rows_kernel, (rows,), x_MN.device, arguments, **meta)
    return last, vector


def scale_unless_one(x: Tensor, factor: Tensor, divisor: float | Tensor) -> None:
    """Multiply x by factor / divisor in place, without waiting; x may have any strides."""
    if not x.numel():
        return
    x_MN = x.view(1, -1) if x.is_contiguous() else x  # without gaps: one long row
    rows, columns = x_MN.shape
    block = 4096
    blocks = -(-columns // block)
    total = rows * blocks
    # Usually there is nothing to do, and programs that only find that out cost their start.
    programs = min(total, 8 * multiprocessors(x.device))
    arguments = (x_MN, factor, divisor, columns, blocks, total, *x_MN.stride())
    meta = {"DIVISOR_ON_DEVICE": isinstance(divisor, Tensor), "BLOCK": block, "num_warps": 8}
    start(sums.scale_unless_one_kernel, (programs,), x.device, arguments, **meta)


def _blocks(n: int) -> int:
    return -(-n // BLOCK)


def _like(x_N: Tensor, *shape: int) -> Tensor:
    return x_N.new_empty(shape, dtype=torch.float32)


def token_kl(
    logprob_N: Tensor, ref_logprob_N: Tensor, kind: str, limit: float
) -> tuple[Tensor, Tensor]:
    """The KL estimate k of each token, and dk/dlogprob."""
    n = logprob_N.numel()
    kl_N, slope_N = _like(logprob_N, n), _like(logprob_N, n)
    if n:
        arguments = (logprob_N, ref_logprob_N, kl_N, slope_N, limit, n)
        kernel = token_kl_kernels.token_kl_kernel
        start(kernel, (_blocks(n),), logprob_N.device, arguments, KIND=kind, BLOCK=BLOCK)
    return kl_N, slope_N


def value_loss(
    value_N: Tensor, old_value_N: Tensor, return_N: Tensor, weight_N: Tensor, clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the vector of ValueMetrics, and dloss/dvalue."""
    n = value_N.numel()
    parts = _blocks(n)
    grad_N, part_MP = _like(value_N, n), _like(value_N, 7, parts)
    if n:
        given = (value_N, old_value_N, return_N, weight_N)
        arguments = (*given, grad_N, part_MP, clip or 0.0, n, parts)
        kernel, meta = value_loss_kernels.value_loss_kernel, {"HAS_CLIP": clip is not None}
        start(kernel, (parts,), value_N.device, arguments, BLOCK=BLOCK, **meta)
    loss, vector = sum_rows(part_MP)
    return loss, vector, grad_N


def _mask(weight_N: Tensor | None) -> Tensor | None:
    """Triton has no pointers to bool."""
    if weight_N is None or weight_N.dtype != torch.bool:
        return weight_N
    return weight_N.view(torch.uint8)


def _moment_parts(x_N: Tensor, weight_N: Tensor | None) -> Tensor:
    """Count, mean and m2 of each of the P blocks of tokens, as a tensor (3, P)."""
    n = x_N.numel()
    parts = _blocks(n)
    part_3P = _like(x_N, 3, parts)
    if n:
        arguments = (x_N, _mask(weight_N), part_3P, n, parts)
        start(whiten_kernels.moments_kernel, (parts,), x_N.device, arguments, BLOCK=BLOCK)
    return part_3P


def moments(x_N: Tensor, weight_N: Tensor | None) -> Tensor:
    """Count, mean and sum of squared deviations (m2), as a tensor (3,)."""
    part_3P, out = _moment_parts(x_N, weight_N), _like(x_N, 3)
    arguments = (part_3P, out, part_3P.shape[1])
    start(whiten_kernels.merge_moments_kernel, (1,), x_N.device, arguments, BLOCK=BLOCK)
    return out


def whiten(
    x_N: Tensor, weight_N: Tensor | None, moments: Tensor | None, shift_mean: bool
) -> Tensor:
    """The values, whitened by the moments (3,) if they are given, else by their own."""
    # `moments` may also be those of all blocks (3, P), which `advantages` passes.
    parts = _moment_parts(x_N, weight_N) if moments is None else moments
    n, part_3P = x_N.numel(), parts.reshape(3, -1).contiguous()
    y_N = _like(x_N, n)
    if n:
        arguments = (x_N, _mask(weight_N), part_3P, y_N, n, part_3P.shape[1])
        meta = {"SHIFT_MEAN": shift_mean, "BLOCK": BLOCK}
        start(whiten_kernels.whiten_kernel, (_blocks(n),), x_N.device, arguments, **meta)
    return y_N


def gae(a: GaeArguments) -> tuple[Tensor, Tensor]:
    """Advantages and returns."""
    n = a.reward_N.numel()
    advantage_N, return_N = _like(a.reward_N, n), _like(a.reward_N, n)
    _gae(a, None, advantage_N, return_N, None)
    return advantage_N, return_N


def _gae(
    a: GaeArguments,
    reward_part_3P: Tensor | None,
    advantage_N: Tensor,
    return_N: Tensor,
    part_3B: Tensor | None,
) -> None:
    """Launch one program for each sequence; if moments are given, they scale the rewards."""
    batch = a.offsets.numel() - 1
    if batch == 0 or a.reward_N.numel() == 0:
        return
    arguments = (
        a.reward_N,
        reward_part_3P,
        a.value_N,
        a.offsets,
        a.bootstrap_value_B,
        advantage_N,
        return_N,
        part_3B,
        a.gamma,
        a.lam,
        0 if reward_part_3P is None else reward_part_3P.shape[1],
        batch,
    )
    start(gae_kernels.gae_kernel, (batch,), a.reward_N.device, arguments, **GAE_SCAN)


def advantages(a: AdvantagesArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards and KL: one launch, one more for either whitening."""
    n, batch = a.logprob_N.numel(), a.offsets.numel() - 1
    advantage_N, return_N, reward_N, kl_N = (_like(a.logprob_N, n) for _ in range(4))
    if n == 0 or batch == 0:
        return advantage_N, return_N, reward_N, kl_N
    part_3B = _like(a.logprob_N, 3, batch)
    arguments = (
        a.score_B,
        a.logprob_N,
        a.ref_logprob_N,
        a.kl_N,
        a.extra_reward_N,
        a.value_N,
        a.offsets,
        a.bootstrap_value_B,
        a.kl_coef,
        advantage_N,
        return_N,
        reward_N,
        kl_N,
        part_3B,
        a.log_ratio_limit,
        a.gamma,
        a.lam,
        batch,
    )
    start(
        advantages_kernels.advantages_kernel,
        (batch,),
        a.logprob_N.device,
        arguments,
        KL_KIND=a.kl_kind,
        KL_COEF_ON_DEVICE=isinstance(a.kl_coef, Tensor),
        REWARDS_ONLY=a.whiten_rewards,
        **ADVANTAGES_SCAN,
    )
    if a.whiten_rewards:
        of_rewards, part_3B = part_3B, torch.empty_like(part_3B)
        shaped = (reward_N, a.value_N, a.offsets, a.gamma, a.lam, a.bootstrap_value_B, a.backend)
        _gae(GaeArguments(*shaped), of_rewards, advantage_N, return_N, part_3B)
    if a.whiten_advantages:
        advantage_N = whiten(advantage_N, None, part_3B, True)
    return advantage_N, return_N, reward_N, kl_N
