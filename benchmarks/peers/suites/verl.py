"""verl: its tests of core_algos, of the aggregation and of the critic's loss."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.stubs import verl_core
from benchmarks.peers.suites import Suite, ours
from fastppo import ops
from fastppo.ops import losses


def _denominator(mode: str, tokens: Any, sequences: Any) -> Any:
    return {"token-mean": tokens, "token-sum": None}.get(mode, sequences)


@ours
def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """A loss of tokens, aggregated; dp_size undoes the mean over ranks."""
    norm = {}
    if loss_agg_mode.endswith("norm"):
        norm = {"max_length": float(loss_scale_factor or loss_mask.shape[1])}
    denominator = _denominator(loss_agg_mode, batch_num_tokens, global_batch_size)
    return dp_size * losses.aggregate(loss_mat, loss_mask, loss_agg_mode, denominator, **norm)


@ours
def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    **aggregation: Any,
) -> tuple[Tensor, Tensor]:
    """The critic's loss, and the share of clipped tokens."""
    found = losses.value_loss(vpreds, values, returns, response_mask, clip=cliprange_value)
    share = losses.aggregate(found.clipped.float(), response_mask)
    return agg_loss(found.loss, response_mask, **aggregation), share


@ours
def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """The KL of each token; k3 is clamped to 10, as theirs is."""
    limit = 10.0 if kl_penalty.rstrip("+") in ("k3", "low_var_kl") else None
    return losses.kl(logprob, ref_logprob, kind=kl_penalty, limit=limit)


@ours
def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any
) -> tuple[Tensor, Tensor]:
    """GAE over the live tokens, whitened, and the returns."""
    live = response_mask != 0
    lengths = live.sum(1).int()
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    given = (token_level_rewards[live], values[live], offsets)
    advantage, returns = ops.gae(*given, gamma=float(gamma), lam=float(lam))
    return tuple(
        torch.zeros_like(values).masked_scatter(live, x) for x in (ops.whiten(advantage), returns)
    )


def _by_group(kind: str, rewards: Tensor, mask: Tensor, index: np.ndarray) -> Any:
    score_B = rewards.sum(1)
    advantage_B = torch.empty_like(score_B)
    for group in np.unique(index):
        of = torch.from_numpy(index == group)
        advantage_B[of] = losses.group_advantages(score_B[of], int(of.sum()), kind=kind, eps=1e-6)
    advantage = advantage_B[:, None] * mask
    return advantage, advantage


@ours
def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray
) -> Any:
    """GRPO's advantages of groups of any size."""
    return _by_group("grpo", token_level_rewards, response_mask, index)


@ours
def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray
) -> Any:
    """RLOO's advantages of groups of any size."""
    return _by_group("rloo", token_level_rewards, response_mask, index)


@ours
def compute_policy_loss_dro(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
) -> Any:
    """DRO; a beta that is missing is refused by its configuration's name."""
    beta = config.policy_loss.dro_beta
    if beta is None:
        raise ValueError("dro_beta must be > 0, came None")
    found = losses.dro(log_prob, old_log_prob, advantages, response_mask, beta=beta)
    return losses.aggregate(found.loss, response_mask, loss_agg_mode), {}


def prepare(source: Path) -> None:
    """The checkout's core_algos, what it imports but does not use being a stub."""
    verl_core(source / "verl", importlib.import_module)
    for name in [name for name in sys.modules if name.startswith("verl.")]:
        parent, child = name.rsplit(".", 1)  # which running the package's __init__ would have set
        setattr(sys.modules[parent], child, sys.modules[name])


SUITE = Suite(
    folder="verl",
    files=(
        "tests/trainer/ppo/test_core_algos_on_cpu.py",
        "tests/trainer/ppo/test_dynamic_policy_losses_on_cpu.py",
        "tests/trainer/ppo/test_loss_aggregation_on_cpu.py",
        "tests/trainer/ppo/test_value_loss_normalization_on_cpu.py",
    ),
    replaced={
        "agg_loss": agg_loss,
        "compute_gae_advantage_return": compute_gae_advantage_return,
        "compute_grpo_outcome_advantage": compute_grpo_outcome_advantage,
        "compute_policy_loss_dro": compute_policy_loss_dro,
        "compute_rloo_outcome_advantage": compute_rloo_outcome_advantage,
        "compute_value_loss": compute_value_loss,
        "kl_penalty": kl_penalty,
    },
    prepare=prepare,
)
