"""From scores and log-probs to whitened advantages: the KL-shaped reward, GAE, returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.ops import checks
from fastppo.ops.arguments import join, split
from fastppo.ops.backend import choose, token_kernels
from fastppo.ops.config import check_kl_kind
from fastppo.ops.gae import gae_scan
from fastppo.ops.token_kl import kl_and_slope
from fastppo.ops.whiten import whiten

KL_LIMIT = 20.0


class Advantages(NamedTuple):
    """All (N,) and without gradient; rewards are those that the returns were made of."""

    advantage_N: Tensor
    return_N: Tensor
    reward_N: Tensor
    kl_N: Tensor


def advantages(
    score_B: Tensor,
    logprob_N: Tensor,
    ref_logprob_N: Tensor,
    value_N: Tensor,
    offsets: Tensor,
    *,
    kl_coef: float | Tensor,
    kl_kind: str = "k1",
    kl_N: Tensor | None = None,
    extra_reward_N: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_value_B: Tensor | None = None,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    backend: str | None = None,
) -> Advantages:
    r"""Advantages, returns, rewards and KL of a rollout's packed tokens, in the score's units.

        r_t = -kl_coef * kl_t + extra_t,    plus score at a sequence's last token
        A, R = GAE(r, V),    then A is whitened over the whole batch, R is not

    Args:
        score_B: float (B,), score of each response.
        logprob_N: float (N,), log-prob of each sampled token under the policy that sampled.
        ref_logprob_N: float (N,), the same under the reference.
        value_N: float (N,), V of the state before each token.
        offsets: int32 (B+1,), where each sequence starts; a sequence without tokens loses its
            score.
        kl_coef: beta >= 0, a float or a 0-d tensor.
        kl_kind: "k1", "abs", "k2" or "k3": how kl_t is estimated from the two log-probs.
        kl_N: float (N,), an exact KL to take in its place.
        extra_reward_N: float (N,), further rewards by token.
        gamma: discount, in [0, 1].
        lam: trace decay, in [0, 1].
        bootstrap_value_B: float (B,), see `gae`.
        whiten_rewards: scale rewards to variance 1 before GAE; their mean stays.
        whiten_advantages: shift and scale advantages to mean 0 and variance 1.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        Advantages(advantage_N, return_N, reward_N, kl_N), float32 (float64 where an input is),
        without gradient.

    Raises:
        ValueError: shapes that disagree, another kind, a setting out of range.
        TypeError: inputs that hold no floats, offsets that hold no integers.

    Source: Stiennon et al. 2020, Learning to Summarize from Human Feedback, section 3.4 (KL in the
    reward); Schulman et al. 2016, eq. 16 (GAE).
    """
    op = "advantages"
    check_kl_kind(op, kl_kind)
    checks.floating(op, "logprob_N", logprob_N, ndim=1)
    n = logprob_N.numel()
    optional = {"kl_N": kl_N, "extra_reward_N": extra_reward_N}
    given = {"ref_logprob_N": ref_logprob_N, "value_N": value_N, **optional}
    for name, tensor in given.items():
        checks.row_vector(op, name, tensor, logprob_N, n=n)
    checks.offsets(op, offsets, logprob_N, n=n)
    batch = offsets.numel() - 1
    for name, tensor in {"score_B": score_B, "bootstrap_value_B": bootstrap_value_B}.items():
        checks.row_vector(op, name, tensor, logprob_N, n=batch)
    checks.unit_interval(op, "gamma", gamma)
    checks.unit_interval(op, "lam", lam)
    checks.scalar(op, "kl_coef", kl_coef, logprob_N)
    chosen = choose(op, backend, logprob_N, score_B, ref_logprob_N, value_N)
    with torch.no_grad():
        outputs = torch.ops.fastppo.advantages(
            score_B,
            logprob_N,
            ref_logprob_N,
            value_N,
            offsets,
            *split(kl_coef),
            kl_kind,
            kl_N,
            extra_reward_N,
            gamma,
            lam,
            bootstrap_value_B,
            whiten_rewards,
            whiten_advantages,
            chosen,
        )
    return Advantages(*outputs)


@torch.library.custom_op(
    "fastppo::advantages",
    mutates_args=(),
    schema="(Tensor score_B, Tensor logprob_N, Tensor ref_logprob_N, Tensor value_N, "
    "Tensor offsets, Tensor? kl_coef_tensor, float kl_coef, str kl_kind, Tensor? kl_N, "
    "Tensor? extra_reward_N, float gamma, float lam, Tensor? bootstrap_value_B, "
    "bool whiten_rewards, bool whiten_advantages, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    score_B: Tensor,
    logprob_N: Tensor,
    ref_logprob_N: Tensor,
    value_N: Tensor,
    offsets: Tensor,
    kl_coef_tensor: Tensor | None,
    kl_coef: float,
    kl_kind: str,
    kl_N: Tensor | None,
    extra_reward_N: Tensor | None,
    gamma: float,
    lam: float,
    bootstrap_value_B: Tensor | None,
    whiten_rewards: bool,
    whiten_advantages: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    beta = join(kl_coef_tensor, kl_coef)
    if backend != "torch":
        found: tuple[Tensor, Tensor, Tensor, Tensor] = token_kernels(backend).advantages(
            score_B,
            logprob_N,
            ref_logprob_N,
            kl_N,
            extra_reward_N,
            value_N,
            offsets,
            bootstrap_value_B,
            beta,
            kl_kind,
            KL_LIMIT,
            gamma,
            lam,
            whiten_rewards,
            whiten_advantages,
        )
        return found
    dtype = checks.stat_dtype(score_B, logprob_N, ref_logprob_N, value_N)
    if kl_N is None:
        kl_N, _ = kl_and_slope(logprob_N.to(dtype), ref_logprob_N.to(dtype), kl_kind, KL_LIMIT)
    else:
        kl_N = kl_N.to(dtype, copy=True)
    beta = beta.to(dtype) if isinstance(beta, Tensor) else beta
    reward_N = -beta * kl_N
    if extra_reward_N is not None:
        reward_N = reward_N + extra_reward_N.to(dtype)
    reward_N = reward_N + _at_last_token(score_B.to(dtype), offsets, logprob_N.numel())
    if whiten_rewards:
        reward_N = whiten(reward_N, shift_mean=False, backend="torch")
    bootstrap_B = None if bootstrap_value_B is None else bootstrap_value_B.to(dtype)
    value_N = value_N.to(dtype)
    advantage_N, return_N = gae_scan(reward_N, value_N, offsets, gamma, lam, bootstrap_B)
    if whiten_advantages:
        advantage_N = whiten(advantage_N, backend="torch")
    return advantage_N, return_N, reward_N, kl_N


@_forward.register_fake
def _(
    score_B: Tensor, logprob_N: Tensor, ref_logprob_N: Tensor, value_N: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = checks.stat_dtype(score_B, logprob_N, ref_logprob_N, value_N)
    n = logprob_N.shape[0]
    a, b, c, d = (logprob_N.new_empty(n, dtype=dtype) for _ in Advantages._fields)
    return a, b, c, d


def _at_last_token(score_B: Tensor, offsets: Tensor, n: int) -> Tensor:
    """The scores at their sequences' last tokens, (n,), 0 elsewhere."""
    if n == 0:
        return score_B.new_zeros(0)
    # A sequence without tokens would point at its neighbour's last token: it adds 0 there.
    last_B = (offsets[1:].long() - 1).clamp(min=0)
    given_B = torch.where(offsets.diff() > 0, score_B, 0)
    return score_B.new_zeros(n).index_add(0, last_B, given_B)
