"""torchrl: its tests of GAE, of which the vectorised one is ours and the loop stays theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.suites import Suite, ours
from fastppo import ops


def number(x: Any) -> float:
    """A discount; ours is one number for all tokens, so a tensor must hold one and the same."""
    values = torch.as_tensor(x, dtype=torch.float64).unique()
    if len(values) != 1:
        raise ValueError("gae: gamma and lam must be one number each")
    return float(values)


@ours
def vec_generalized_advantage_estimate(
    gamma: Any,
    lmbda: Any,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of trajectories side by side in time, which end where `done` is.

    Ours takes a value for each token and one behind the last. Theirs takes next values apart, so
    each reward carries gamma times the difference between its next value and the next token's.
    """
    terminated = done if terminated is None else terminated

    def rows(x: Tensor) -> Tensor:
        return x.transpose(time_dim, -1).reshape(-1, x.shape[time_dim])

    value, following, got, ended, final = (
        rows(x) for x in (state_value, next_state_value, reward, done, terminated)
    )
    ended = ended.bool().clone()
    ended[:, -1] = True
    last = ended.flatten().nonzero().flatten() + 1
    offsets = torch.cat([last.new_zeros(1), last]).int()
    following = torch.where(final.bool(), 0, following)
    ours_next = torch.cat([value[:, 1:], value.new_zeros(len(value), 1)], 1).masked_fill(ended, 0)
    bootstrap = following[ended]
    got = got + torch.where(ended, 0, number(gamma) * (following - ours_next))
    advantage, returns = ops.gae(
        got.flatten(),
        value.flatten(),
        offsets,
        gamma=number(gamma),
        lam=number(lmbda),
        bootstrap_value_B=bootstrap.contiguous(),
    )
    swapped = state_value.transpose(time_dim, -1)
    return tuple(
        x.to(value.dtype).reshape(swapped.shape).transpose(time_dim, -1)
        for x in (advantage, returns)
    )


SUITE = Suite(
    folder="rl",
    files=("test/objectives/test_values.py",),
    replaced={"vec_generalized_advantage_estimate": vec_generalized_advantage_estimate},
    package="torchrl",
    path=("test", "test/objectives"),
    select="gae",
    why="the tests whose name says GAE.",
)
