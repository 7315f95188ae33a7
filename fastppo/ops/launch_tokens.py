"""How the Triton kernels over tokens and sequences are launched; everything here is small."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fastppo.kernels import advantages as advantages_kernels
from fastppo.kernels import gae as gae_kernels
from fastppo.kernels import token_kl as token_kl_kernels
from fastppo.kernels import value_loss as value_loss_kernels
from fastppo.kernels import whiten as whiten_kernels
from fastppo.ops.launch import start, sum_rows

BLOCK: Final = 1024
# Associative scans of more lanes need registers that grow with them.
SCAN_BLOCK: Final = 1024


def _blocks(n: int) -> int:
    return -(-n // BLOCK)


def _like(x_N: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x_N.device)


def token_kl(
    logprob_N: Tensor, ref_logprob_N: Tensor, kind: str, limit: float
) -> tuple[Tensor, Tensor]:
    """k and dk/dlogprob of each token."""
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
    """Loss, the vector of ValueMetrics, and dloss/dvalue."""
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


def moments(x_N: Tensor, weight_N: Tensor | None) -> Tensor:
    """(3, P): count, mean and m2 of each of the P blocks of tokens."""
    n = x_N.numel()
    parts = _blocks(n)
    part_3P = _like(x_N, 3, parts)
    if n:
        arguments = (x_N, _mask(weight_N), part_3P, n, parts)
        start(whiten_kernels.moments_kernel, (parts,), x_N.device, arguments, BLOCK=BLOCK)
    return part_3P


def _mask(weight_N: Tensor | None) -> Tensor | None:
    """Triton has no pointers to bool."""
    if weight_N is None or weight_N.dtype != torch.bool:
        return weight_N
    return weight_N.view(torch.uint8)


def merge_moments(part_3P: Tensor) -> Tensor:
    """(3,): count, mean and m2 of all parts."""
    out = _like(part_3P, 3)
    arguments = (part_3P, out, part_3P.shape[1])
    start(whiten_kernels.merge_moments_kernel, (1,), part_3P.device, arguments, BLOCK=BLOCK)
    return out


def whiten(x_N: Tensor, weight_N: Tensor | None, part_3P: Tensor, shift_mean: bool) -> Tensor:
    """Values shifted and scaled by the moments of all parts."""
    n = x_N.numel()
    y_N = _like(x_N, n)
    if n:
        part_3P = part_3P.contiguous()
        arguments = (x_N, _mask(weight_N), part_3P, y_N, n, part_3P.shape[1])
        kernel, meta = whiten_kernels.whiten_kernel, {"SHIFT_MEAN": shift_mean, "BLOCK": BLOCK}
        start(kernel, (_blocks(n),), x_N.device, arguments, **meta)
    return y_N


def gae(
    reward_N: Tensor,
    value_N: Tensor,
    offsets: Tensor,
    gamma: float,
    lam: float,
    bootstrap_value_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns."""
    advantage_N, return_N = _like(reward_N, reward_N.numel()), _like(reward_N, reward_N.numel())
    _gae(
        reward_N, None, value_N, offsets, bootstrap_value_B, advantage_N, return_N, None, gamma, lam
    )
    return advantage_N, return_N


def _gae(
    reward_N: Tensor,
    reward_part_3P: Tensor | None,
    value_N: Tensor,
    offsets: Tensor,
    bootstrap_value_B: Tensor | None,
    advantage_N: Tensor,
    return_N: Tensor,
    part_3B: Tensor | None,
    gamma: float,
    lam: float,
) -> None:
    batch = offsets.numel() - 1
    if batch == 0 or reward_N.numel() == 0:
        return
    arguments = (
        reward_N,
        reward_part_3P,
        value_N,
        offsets,
        bootstrap_value_B,
        advantage_N,
        return_N,
        part_3B,
        gamma,
        lam,
        0 if reward_part_3P is None else reward_part_3P.shape[1],
        batch,
    )
    start(gae_kernels.gae_kernel, (batch,), reward_N.device, arguments, BLOCK=SCAN_BLOCK)


def advantages(
    score_B: Tensor,
    logprob_N: Tensor,
    ref_logprob_N: Tensor,
    exact_kl_N: Tensor | None,
    extra_reward_N: Tensor | None,
    value_N: Tensor,
    offsets: Tensor,
    bootstrap_value_B: Tensor | None,
    kl_coef: float | Tensor,
    kl_kind: str,
    limit: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
    whiten_advantages: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards and KL: one launch, one more for either whitening."""
    n, batch = logprob_N.numel(), offsets.numel() - 1
    advantage_N, return_N, reward_N, kl_N = (_like(logprob_N, n) for _ in range(4))
    if n == 0 or batch == 0:
        return advantage_N, return_N, reward_N, kl_N
    part_3B = _like(logprob_N, 3, batch)
    arguments = (
        score_B,
        logprob_N,
        ref_logprob_N,
        exact_kl_N,
        extra_reward_N,
        value_N,
        offsets,
        bootstrap_value_B,
        kl_coef,
        advantage_N,
        return_N,
        reward_N,
        kl_N,
        part_3B,
        limit,
        gamma,
        lam,
        batch,
    )
    start(
        advantages_kernels.advantages_kernel,
        (batch,),
        logprob_N.device,
        arguments,
        KL_KIND=kl_kind,
        KL_COEF_ON_DEVICE=isinstance(kl_coef, Tensor),
        REWARDS_ONLY=whiten_rewards,
        BLOCK=SCAN_BLOCK,
    )
    if whiten_rewards:
        reward_part_3B, part_3B = part_3B, torch.empty_like(part_3B)
        _gae(
            reward_N,
            reward_part_3B,
            value_N,
            offsets,
            bootstrap_value_B,
            advantage_N,
            return_N,
            part_3B,
            gamma,
            lam,
        )
    if whiten_advantages:
        advantage_N = whiten(advantage_N, None, part_3B, True)
    return advantage_N, return_N, reward_N, kl_N
