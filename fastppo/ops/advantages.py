"""From scores and log-probs to whitened advantages: rewards with a KL penalty, GAE, returns."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from fastppo.ops.arguments import chosen_backend, is_traced, stat_dtype
from fastppo.ops.backends import BACKENDS, AdvantagesArguments
from fastppo.ops.checks import (
    check_flag,
    check_floating,
    check_offsets,
    check_scalar,
    check_unit_interval,
    check_vector,
)
from fastppo.ops.config import KL_KINDS, check_kl_kind
from fastppo.ops.registered import register

KL_LIMIT: Final = 20.0  # k3 clamps the log ratio to +-this


class Advantages(NamedTuple):
    """Result of `advantages`: all (N,), without gradient; returns are computed from `reward_N`."""

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

        r_t = -kl_coef * kl_t + extra_t,    plus the score at a sequence's last token
        A, R = GAE(r, V),    then A is whitened over the whole batch; R is not


    Args:
        score_B: float (B,), score of each response.
        logprob_N: float (N,), log-prob of each sampled token under the policy that sampled.
        ref_logprob_N: float (N,), the same under the reference.
        value_N: float (N,), V of the state before each token.
        offsets: int32 (B+1,), where each sequence starts; the score of a sequence without tokens is
            ignored.
        kl_coef: beta >= 0, a float or a 0-d tensor.
        kl_kind: "k1", "abs", "k2" or "k3": the estimate of kl_t from the two log-probs.
        kl_N: float (N,), an exact KL to use instead of the estimate.
        extra_reward_N: float (N,), an additional reward for each token.
        gamma: discount, in [0, 1].
        lam: trace decay, in [0, 1].
        bootstrap_value_B: float (B,), see `gae`.
        whiten_rewards: whether to scale rewards to variance 1 before GAE; their mean stays.
        whiten_advantages: whether to shift and scale advantages to mean 0 and variance 1.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        Advantages(advantage_N, return_N, reward_N, kl_N), float32 (float64 where an input is),
        without gradient.

    Raises:
        ValueError: shapes that disagree, an unknown kind, a setting out of range.
        TypeError: inputs that are not floating point, offsets that are not integers.

    Source: Stiennon et al. 2020, Learning to Summarize from Human Feedback, section 3.4 (KL in the
    reward); Schulman et al. 2016, eq. 16 (GAE).
    """
    op = "advantages"
    if kl_kind not in KL_KINDS:
        check_kl_kind(op, kl_kind)
    check_floating(op, "logprob_N", logprob_N, ndim=1)
    n = logprob_N.numel()
    check_vector(op, "ref_logprob_N", ref_logprob_N, logprob_N, n=n)
    check_vector(op, "value_N", value_N, logprob_N, n=n)
    check_vector(op, "kl_N", kl_N, logprob_N, n=n, optional=True)
    check_vector(op, "extra_reward_N", extra_reward_N, logprob_N, n=n, optional=True)
    check_offsets(op, offsets, logprob_N, n=n)
    batch = offsets.numel() - 1
    check_vector(op, "score_B", score_B, logprob_N, n=batch)
    check_vector(op, "bootstrap_value_B", bootstrap_value_B, logprob_N, n=batch, optional=True)
    check_flag(op, "whiten_rewards", whiten_rewards)
    check_flag(op, "whiten_advantages", whiten_advantages)
    check_unit_interval(op, "gamma", gamma)
    check_unit_interval(op, "lam", lam)
    check_scalar(op, "kl_coef", kl_coef, logprob_N)
    chosen = chosen_backend(op, backend, logprob_N, score_B, ref_logprob_N, value_N)
    given = AdvantagesArguments(
        score_B=score_B,
        logprob_N=logprob_N,
        ref_logprob_N=ref_logprob_N,
        value_N=value_N,
        offsets=offsets,
        kl_coef=kl_coef,
        kl_kind=kl_kind,
        kl_N=kl_N,
        extra_reward_N=extra_reward_N,
        gamma=gamma,
        lam=lam,
        bootstrap_value_B=bootstrap_value_B,
        whiten_rewards=whiten_rewards,
        whiten_advantages=whiten_advantages,
        log_ratio_limit=KL_LIMIT,
        backend=chosen,
    )
    with torch.no_grad():
        return _registered(given) if is_traced(logprob_N) else _forward(given)


def _forward(a: AdvantagesArguments) -> Advantages:
    return Advantages(*BACKENDS[a.backend].advantages(a))


def _fake(a: AdvantagesArguments) -> Advantages:
    dtype = stat_dtype(a.score_B, a.logprob_N, a.ref_logprob_N, a.value_N)
    n = a.logprob_N.shape[0]
    return Advantages(*(a.logprob_N.new_empty(n, dtype=dtype) for _ in Advantages._fields))


_registered = register("advantages", AdvantagesArguments, Advantages, _forward, _fake)
