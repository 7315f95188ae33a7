"""How the C++ kernels over tokens and sequences are called; the twin of `launch_tokens`."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from fastppo.ops.native import KL_KINDS, Call, scalar
from fastppo.ops.native_library import LIBRARY, AdvantagesStruct


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def token_kl(
    logprob_N: Tensor, ref_logprob_N: Tensor, kind: str, limit: float
) -> tuple[Tensor, Tensor]:
    """k and dk/dlogprob of each token."""
    n, call = logprob_N.numel(), Call()
    kl_N, slope_N = _empty(n), _empty(n)
    LIBRARY.fastppo_token_kl(
        call.floats(logprob_N),
        call.floats(ref_logprob_N),
        kl_N.data_ptr(),
        slope_N.data_ptr(),
        n,
        limit,
        KL_KINDS[kind],
    )
    return kl_N, slope_N


def value_loss(
    value_N: Tensor, old_value_N: Tensor, return_N: Tensor, weight_N: Tensor, clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, the vector of ValueMetrics, and dloss/dvalue."""
    n, call = value_N.numel(), Call()
    grad_N, sums = _empty(n), _empty(7)
    part = torch.empty(LIBRARY.fastppo_value_loss_parts(n), 7, dtype=torch.float64)
    LIBRARY.fastppo_value_loss(
        call.floats(value_N),
        call.floats(old_value_N),
        call.floats(return_N),
        call.floats(weight_N),
        clip or 0.0,
        n,
        grad_N.data_ptr(),
        part.data_ptr(),
        sums.data_ptr(),
    )
    return sums[-1].clone(), sums[:-1].clone(), grad_N


def moments(x_N: Tensor, weight_N: Tensor | None) -> Tensor:
    """(3, 1): count, mean and m2."""
    n, call = x_N.numel(), Call()
    part = torch.empty(LIBRARY.fastppo_moments_parts(n), 3, dtype=torch.float64)
    out = _empty(3)
    LIBRARY.fastppo_moments(
        call.floats(x_N), call.floats(weight_N), n, part.data_ptr(), out.data_ptr()
    )
    return out[:, None]


def merge_moments(part_3P: Tensor) -> Tensor:
    """(3,): count, mean and m2 of the one part that `moments` gives."""
    return part_3P.reshape(3).clone()


def whiten(x_N: Tensor, weight_N: Tensor | None, part_3P: Tensor, shift_mean: bool) -> Tensor:
    """Values shifted and scaled by the moments."""
    n, call = x_N.numel(), Call()
    y_N = _empty(n)
    LIBRARY.fastppo_whiten(
        call.floats(x_N),
        call.floats(weight_N),
        call.floats(part_3P.reshape(3)),
        n,
        shift_mean,
        y_N.data_ptr(),
    )
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
    n, call = reward_N.numel(), Call()
    advantage_N, return_N = _empty(n), _empty(n)
    if offsets.numel() > 1:
        LIBRARY.fastppo_gae(
            call.floats(reward_N),
            call.floats(value_N),
            call.pointer(offsets.long().contiguous()),
            offsets.numel() - 1,
            call.floats(bootstrap_value_B),
            gamma,
            lam,
            advantage_N.data_ptr(),
            return_N.data_ptr(),
        )
    return advantage_N, return_N


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
    """Advantages, returns, rewards and KL, in one call."""
    n, batch, call = logprob_N.numel(), offsets.numel() - 1, Call()
    outputs = (_empty(n), _empty(n), _empty(n), _empty(n))
    if n == 0 or batch == 0:
        return outputs
    advantage_N, return_N, reward_N, kl_N = outputs
    beta = kl_coef if isinstance(kl_coef, Tensor) else None
    struct = AdvantagesStruct(
        score=call.floats(score_B),
        logprob=call.floats(logprob_N),
        ref=call.floats(ref_logprob_N),
        exact_kl=call.floats(exact_kl_N),
        extra=call.floats(extra_reward_N),
        value=call.floats(value_N),
        offsets=call.pointer(offsets.long().contiguous()),
        bootstrap=call.floats(bootstrap_value_B),
        advantage=advantage_N.data_ptr(),
        returns=return_N.data_ptr(),
        reward=reward_N.data_ptr(),
        kl=kl_N.data_ptr(),
        part=call.pointer(torch.empty(batch, 3, dtype=torch.float64)),
        batch=batch,
        gamma=gamma,
        lam=lam,
        kl_coef=scalar(beta, 0.0 if beta is not None else kl_coef),  # type: ignore[arg-type]
        limit=limit,
        kl_kind=KL_KINDS[kl_kind],
        whiten_rewards=whiten_rewards,
        whiten_advantages=whiten_advantages,
    )
    LIBRARY.fastppo_advantages(byref(struct))
    return outputs
