"""Experience -> metrics: PPO's epochs over mini-batches and micro-batches."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastppo.batch import Batch, batches, token_index
from fastppo.errors import TrainingStopped
from fastppo.ops import PolicyLossConfig, linear_policy_loss, value_loss
from fastppo.optim import adamw
from fastppo.types import Experience

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.roles import Roles

# Mean |log ratio| of the first pass, where the policy has not moved yet; ten times it stops the
# run.
FIRST_PASS_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make_optimizer(config: Config, roles: Roles) -> torch.optim.Optimizer:
    """AdamW over two groups: the actor's parameters and the critic's."""
    return adamw(
        config.optim,
        [
            {"params": roles.trained_parameters("actor"), "lr": config.learning_rate},
            {
                "params": roles.trained_parameters("critic"),
                "lr": config.critic_learning_rate or config.learning_rate,
            },
        ],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


@dataclass
class Totals:
    """Sums over all micro-batches of a PPO step, on the device; divided once, at the end."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    skipped: int = 0
    grad_norms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    early_stopped: bool = False
    first_pass: float = 0.0

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum; names ending in _max keep the maximum."""
        value = value.detach()
        if name not in self.sums:
            self.sums[name] = value
        elif name.endswith("_max"):
            self.sums[name] = torch.maximum(self.sums[name], value)
        else:
            self.sums[name] = self.sums[name] + value

    def result(self) -> dict[str, float]:
        """The step's means, by the names of docs/metrics.md."""
        sums = {name: value.item() for name, value in self.sums.items()}
        tokens = max(sums["count"], 1.0)
        steps = max(self.steps, 1)
        norms = {
            f"grad_norm_{role}": sum(values) / len(values)
            for role, values in self.grad_norms.items()
        }
        return {
            "policy_loss": sums["policy_loss"] / steps,
            "value_loss": sums["value_loss"] / steps,
            "clipfrac": sums["clipped"] / tokens,
            "value_clipfrac": sums["value_clipped"] / tokens,
            "approxkl": sums["approx_kl"] / tokens,
            "policykl": sums["policy_kl"] / tokens,
            "ratio_mean": sums["ratio"] / tokens,
            "ratio_max": sums["ratio_max"],
            "ratio_first_pass": self.first_pass,
            "optimizer_steps": float(self.steps - self.skipped),
            "skipped_steps": float(self.skipped),
            "early_stopped": float(self.early_stopped),
            **norms,
        }


@dataclass(frozen=True)
class MiniBatch:
    """Rows of one optimiser step, and a token's weight, fixed before any micro-batch runs.

    token-mean over the whole optimiser step: how it is split into micro-batches changes only
    rounding.
    """

    rows: list[int]
    token_weight: float


def mini_batches(experience: Experience, config: Config, seed: int) -> list[MiniBatch]:
    """One epoch's optimiser steps: all rows once, in an order of their own."""
    generator = torch.Generator().manual_seed(seed)
    lengths = experience.scored.rollout.response_lengths
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return [
        MiniBatch(rows, 1.0 / sum(lengths[row] for row in rows))
        for rows in (order[start : start + size] for start in range(0, len(order), size))
    ]


def policy_loss_config(config: Config) -> PolicyLossConfig:
    """The op's configuration under TRL's names."""
    return PolicyLossConfig(
        clip_low=config.cliprange, clip_high=config.cliprange, entropy_coef=config.entropy_coef
    )


def backward(
    roles: Roles,
    experience: Experience,
    batch: Batch,
    mini: MiniBatch,
    config: Config,
    totals: Totals,
) -> Tensor:
    """Losses and gradients of one micro-batch; gives back |log ratio| summed over its tokens."""
    scored = experience.scored
    index_N = token_index(scored.offsets, batch.rows)
    weight_N = torch.full_like(scored.logprob_N[index_N], mini.token_weight)
    lm_head = roles.lm_head
    with roles.use("actor"):
        actor_ND = batch.packing.gather(roles.hidden(batch.input_ids_BT, batch.mask_BT))
        policy = linear_policy_loss(
            actor_ND.to(lm_head.weight_VD.dtype),
            lm_head.weight_VD,
            batch.token_N,
            scored.logprob_N[index_N],
            experience.advantage_N[index_N],
            weight_N,
            bias_V=lm_head.bias_V,
            softcap=lm_head.softcap,
            temperature=config.temperature,
            config=policy_loss_config(config),
        )
        stats = policy.metrics
        # A batch whose mean ratio has run away teaches nothing (TRL's ratio_threshold). On the
        # device: no synchronisation.
        keep = (stats.ratio_sum <= config.ratio_threshold * stats.count).to(policy.loss.dtype)
        if roles.shares_trunk:
            value = critic_loss(roles, experience, index_N, actor_ND, weight_N, config, totals)
            (keep * (policy.loss + config.vf_coef * value)).backward()
        else:
            (keep * policy.loss).backward()
    if not roles.shares_trunk:
        with roles.use("critic"):
            critic_ND = batch.packing.gather(roles.hidden(batch.input_ids_BT, batch.mask_BT))
            value = critic_loss(roles, experience, index_N, critic_ND, weight_N, config, totals)
            (keep * config.vf_coef * value).backward()
    totals.add("policy_loss", policy.loss)
    for name in ("count", "ratio_max"):
        totals.add(name, getattr(stats, name))
    for name in ("ratio", "clipped", "approx_kl", "policy_kl"):
        totals.add(name, getattr(stats, f"{name}_sum"))
    return (policy.logprob_N - scored.logprob_N[index_N]).abs().sum()


def critic_loss(
    roles: Roles,
    experience: Experience,
    index_N: Tensor,
    hidden_ND: Tensor,
    weight_N: Tensor,
    config: Config,
    totals: Totals,
) -> Tensor:
    """The clipped value loss, with the values of the rollout as the old ones."""
    value = value_loss(
        roles.value(hidden_ND),
        experience.scored.value_N[index_N],
        experience.return_N[index_N],
        weight_N,
        clip=config.cliprange_value,
    )
    totals.add("value_loss", value.loss)
    totals.add("value_clipped", value.metrics.clipped_sum)
    return value.loss


def clip_and_step(
    roles: Roles, optimizer: torch.optim.Optimizer, config: Config, totals: Totals
) -> None:
    """Clip each trained role by its own norm, once, after the last micro-batch; then step.

    Actor and critic apart: a critic far from its target would otherwise shrink the actor's step. A
    gradient that is not finite skips the step, and the optimiser's state stays clean.
    """
    limit = config.max_grad_norm if config.max_grad_norm > 0 else float("inf")
    norms = {
        role: nn.utils.clip_grad_norm_(group["params"], limit)
        for role, group in zip(("actor", "critic"), optimizer.param_groups, strict=True)
    }
    totals.steps += 1
    if not all(torch.isfinite(norm).item() for norm in norms.values()):
        totals.skipped += 1
        return
    for role, norm in norms.items():
        totals.grad_norms[role].append(norm.item())
    optimizer.step()


def check_first_pass(mean_log_ratio: float, config: Config) -> None:
    """Before anything was learned the ratio is 1; far from it, every advantage trains nonsense."""
    limit = 10 * FIRST_PASS_LIMIT[torch.bfloat16 if config.bf16 else torch.float32]
    if not mean_log_ratio <= limit:
        raise TrainingStopped(
            f"mean |log ratio| is {mean_log_ratio:.2g} before the first update, the limit is "
            f"{limit:.0e}; the likeliest cause: scoring and update run different weights, dropout "
            f"or "
            "attention kernels"
        )


def update(
    roles: Roles,
    experience: Experience,
    config: Config,
    optimizer: torch.optim.Optimizer,
    *,
    seed: int,
) -> dict[str, float]:
    """Learn from a rollout: `ppo_epochs` passes over it, an optimiser step a mini-batch."""
    roles.model.train()
    totals = Totals()
    rollout = experience.scored.rollout
    for epoch in range(config.ppo_epochs):
        for mini in mini_batches(experience, config, seed + epoch):
            optimizer.zero_grad(set_to_none=True)
            moved = torch.zeros((), device=roles.device)
            before = totals.sums.get("policy_kl", torch.zeros((), device=roles.device))
            for batch in batches(rollout, mini.rows, config.per_device_train_batch_size):
                moved = moved + backward(roles, experience, batch, mini, config, totals)
            if totals.steps == 0:
                totals.first_pass = moved.item() * mini.token_weight
                check_first_pass(totals.first_pass, config)
            spent = (totals.sums["policy_kl"] - before) * mini.token_weight
            if config.early_stopping and spent.item() > 1.5 * config.target_kl:
                totals.early_stopped = True
                break
            clip_and_step(roles, optimizer, config, totals)
        if totals.early_stopped:
            break
    optimizer.zero_grad(set_to_none=True)
    roles.model.eval()
    return totals.result()
