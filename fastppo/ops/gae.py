"""Generalised advantage estimation over packed sequences."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastppo.ops import checks
from fastppo.ops.backend import choose, token_kernels


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

    A is 0 past a sequence's last token, and V is its bootstrap value there.

    Args:
        reward_N: float (N,), reward of each token.
        value_N: float (N,), V of the state before each token.
        offsets: int32 (B+1,), where each sequence starts; offsets[-1] == N.
        gamma: discount, in [0, 1].
        lam: trace decay, in [0, 1]; 1 is Monte Carlo, 0 is one-step TD.
        bootstrap_value_B: float (B,), V of the state after a sequence's last token, for sequences
            that were cut off; None is 0 for all: they ended.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        advantage_N and return_N = advantage_N + value_N, float32 (float64 where an input is),
        without gradient.

    Raises:
        ValueError: shapes that disagree, offsets that do not ascend, gamma or lam out of range.
        TypeError: inputs that hold no floats, offsets that hold no integers.

    Source: Schulman et al. 2016, High-Dimensional Continuous Control Using GAE, eq. 16.
    """
    op = "gae"
    checks.floating(op, "reward_N", reward_N, ndim=1)
    checks.row_vector(op, "value_N", value_N, reward_N, n=reward_N.numel())
    checks.offsets(op, offsets, reward_N, n=reward_N.numel())
    checks.unit_interval(op, "gamma", gamma)
    checks.unit_interval(op, "lam", lam)
    checks.row_vector(op, "bootstrap_value_B", bootstrap_value_B, reward_N, n=offsets.numel() - 1)
    chosen = choose(op, backend, reward_N, value_N, bootstrap_value_B)
    with torch.no_grad():
        found = torch.ops.fastppo.gae(
            reward_N, value_N, offsets, gamma, lam, bootstrap_value_B, chosen
        )
    return cast("tuple[Tensor, Tensor]", tuple(found))


@torch.library.custom_op(
    "fastppo::gae",
    mutates_args=(),
    schema="(Tensor reward_N, Tensor value_N, Tensor offsets, float gamma, float lam, "
    "Tensor? bootstrap_value_B, str backend) -> (Tensor, Tensor)",
)
def _forward(
    reward_N: Tensor,
    value_N: Tensor,
    offsets: Tensor,
    gamma: float,
    lam: float,
    bootstrap_value_B: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend != "torch":
        found: tuple[Tensor, Tensor] = token_kernels(backend).gae(
            reward_N, value_N, offsets, gamma, lam, bootstrap_value_B
        )
        return found
    dtype = checks.stat_dtype(reward_N, value_N)
    after_B = None if bootstrap_value_B is None else bootstrap_value_B.to(dtype)
    return gae_scan(reward_N.to(dtype), value_N.to(dtype), offsets, gamma, lam, after_B)


@_forward.register_fake
def _(reward_N: Tensor, value_N: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype, n = checks.stat_dtype(reward_N, value_N), reward_N.shape[0]
    return reward_N.new_empty(n, dtype=dtype), reward_N.new_empty(n, dtype=dtype)


def gae_scan(
    reward_N: Tensor,
    value_N: Tensor,
    offsets: Tensor,
    gamma: float,
    lam: float,
    bootstrap_value_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gae` on checked inputs of one dtype: a loop over time, all sequences side by side.

    Sequences lie right-aligned in a (T, B) table, so that step t of the loop is the t-th last token
    of each; where a shorter one has ended, the table holds zeros that lead nowhere.
    """
    batch = offsets.numel() - 1
    if reward_N.numel() == 0 or batch == 0:
        return torch.empty_like(reward_N), torch.empty_like(reward_N)
    length_B = offsets.diff().long()
    longest = int(length_B.max())
    back_T = torch.arange(longest, device=offsets.device)
    live_TB = back_T[:, None] < length_B
    index_TB = torch.where(live_TB, offsets[1:].long() - 1 - back_T[:, None], 0)
    value_TB = value_N[index_TB]
    after_B = reward_N.new_zeros(batch) if bootstrap_value_B is None else bootstrap_value_B
    next_TB = torch.cat([after_B[None], value_TB[:-1]])
    delta_TB = reward_N[index_TB] + gamma * next_TB - value_TB
    carry_B = reward_N.new_zeros(batch)
    rows = []
    for delta_B in delta_TB.unbind(0):
        carry_B = delta_B + gamma * lam * carry_B
        rows.append(carry_B)
    advantage_N = torch.empty_like(reward_N)
    advantage_N[index_TB[live_TB]] = torch.stack(rows)[live_TB]
    return advantage_N, advantage_N + value_N
