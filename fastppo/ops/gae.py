"""Generalised advantage estimation over packed sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops.arguments import chosen_backend, is_traced, stat_dtype
from fastppo.ops.backends import BACKENDS, GaeArguments
from fastppo.ops.checks import check_floating, check_offsets, check_unit_interval, check_vector
from fastppo.ops.registered import register


def gae(
    reward_N: Tensor,
    value_N: Tensor,
    offsets: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_value_B: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Advantages and returns of every token of a packed batch, in the reward's units.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1}

    After a sequence's last token A is 0 and V is the sequence's bootstrap value.

    Args:
        reward_N: float (N,), reward of each token.
        value_N: float (N,), V of the state before each token.
        offsets: int32 (B+1,), where each sequence starts; offsets[-1] == N.
        gamma: discount, in [0, 1].
        lam: trace decay, in [0, 1]; 1 is Monte Carlo, 0 is one-step TD.
        bootstrap_value_B: float (B,), V of the state after a sequence's last token, for truncated
            sequences; 0 for those that ended. None is 0 for all.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        advantage_N and return_N = advantage_N + value_N, float32 (float64 where an input is),
        without gradient.

    Raises:
        ValueError: shapes that disagree, offsets that do not ascend, gamma or lam out of range.
        TypeError: inputs that are not floating point, offsets that are not integers.

    Source: Schulman et al. 2016, High-Dimensional Continuous Control Using GAE, eq. 16.
    """
    op = "gae"
    check_floating(op, "reward_N", reward_N, ndim=1)
    check_vector(op, "value_N", value_N, reward_N, n=reward_N.numel())
    check_offsets(op, offsets, reward_N, n=reward_N.numel())
    check_unit_interval(op, "gamma", gamma)
    check_unit_interval(op, "lam", lam)
    batch = offsets.numel() - 1
    check_vector(op, "bootstrap_value_B", bootstrap_value_B, reward_N, n=batch, optional=True)
    chosen = chosen_backend(op, backend, reward_N, value_N, bootstrap_value_B)
    given = GaeArguments(reward_N, value_N, offsets, gamma, lam, bootstrap_value_B, chosen)
    with torch.no_grad():
        advantage_N, return_N = _registered(given) if is_traced(reward_N) else _forward(given)
    return advantage_N, return_N


class Outputs(NamedTuple):
    """Outputs of the registered operator."""

    advantage_N: Tensor
    return_N: Tensor


def _forward(a: GaeArguments) -> Outputs:
    return Outputs(*BACKENDS[a.backend].gae(a))


def _fake(a: GaeArguments) -> Outputs:
    dtype, n = stat_dtype(a.reward_N, a.value_N), a.reward_N.shape[0]
    return Outputs(a.reward_N.new_empty(n, dtype=dtype), a.reward_N.new_empty(n, dtype=dtype))


_registered = register("gae", GaeArguments, Outputs, _forward, _fake)
