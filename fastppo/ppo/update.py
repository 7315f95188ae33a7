"""Experience -> metrics: PPO's epochs over mini-batches and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.config.ppo import KL_KIND
from fastppo.errors import TrainingStopped
from fastppo.memory.budgets import Budgets
from fastppo.memory.retry import retry
from fastppo.models.batch import Batch, batches, largest, to_device, token_index
from fastppo.models.rounding import LIMITS, Precision
from fastppo.ops import PolicyLoss, PolicyLossConfig, linear_policy_loss, value_loss
from fastppo.ppo.optimizer import clip_and_step
from fastppo.ppo.ptx import ptx_backward
from fastppo.seeds import seed_of
from fastppo.types import Experience, Kept

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.models.build import Roles


@dataclass
class Totals:
    """Sums over micro-batches, left on the device: the host reads them once, at the end."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum; names ending in _max keep the maximum."""
        value = value.detach()
        if name not in self.sums:
            self.sums[name] = value
        elif name.endswith("_max"):
            self.sums[name] = torch.maximum(self.sums[name], value)
        else:
            self.sums[name] = self.sums[name] + value

    def merge(self, other: Totals) -> None:
        """Add all that `other` has."""
        for name, value in other.sums.items():
            self.add(name, value)

    def __getitem__(self, name: str) -> Tensor:
        """One sum, as it is on the device."""
        return self.sums[name]

    def read(self) -> dict[str, float]:
        """All sums, in one transfer."""
        names = list(self.sums)
        values = torch.stack([self.sums[name].double() for name in names]).tolist()
        return dict(zip(names, values, strict=True))


def means(totals: Totals, *, passes: int, steps: int, early_stopped: bool) -> dict[str, float]:
    """The means of a PPO step, by the names of docs/metrics.md."""
    sums = totals.read()
    tokens, passes = max(sums["count"], 1.0), max(passes, 1)
    taken = sums.get("taken", 0.0)
    row = {
        "clipfrac": sums["clipped"] / tokens,
        "approxkl": sums["approx_kl"] / tokens,
        "policykl": sums["policy_kl"] / tokens,
        "ratio_mean": sums["ratio"] / tokens,
        "ratio_max": sums["ratio_max"],
        "optimizer_steps": taken,
        "skipped_steps": steps - taken,
        "nonfinite_steps": sums.get("nonfinite", 0.0),
        "nonfinite_run": sums.get("nonfinite_run", 0.0),
        "early_stopped": float(early_stopped),
    }
    for name in ("policy_loss", "kl_loss", "value_loss", "ptx_loss"):
        if name in sums:
            row[name] = sums[name] / passes
    if "value_clipped" in sums:
        row["value_clipfrac"] = sums["value_clipped"] / tokens
    for name in ("grad_norm_actor", "grad_norm_critic"):
        if name in sums:
            row[name] = sums[name] / max(taken, 1.0)
    return row


@dataclass(frozen=True)
class MiniBatch:
    """Rows of one optimiser step, and what a token of each weighs in its loss."""

    rows: list[int]
    weights: dict[int, float]
    tokens: int


def token_weights(lengths: Sequence[int], mode: str, max_new_tokens: int, /) -> list[float]:
    """What a token of each sequence weighs: verl's `loss_agg_mode` over a whole optimiser step.

    Fixed before any micro-batch runs, so how the step is split into them changes only rounding.
    """
    n = len(lengths)
    return {
        "token-mean": lambda: [1 / sum(lengths)] * n,
        "seq-mean-token-mean": lambda: [1 / (n * length) for length in lengths],
        "seq-mean-token-sum": lambda: [1 / n] * n,
        "seq-mean-token-sum-norm": lambda: [1 / (n * max_new_tokens)] * n,
    }[mode]()


def mini_batches(experience: Experience, config: Config, seed: int) -> list[MiniBatch]:
    """One epoch's optimiser steps: all rows once, in an order of their own."""
    generator = torch.Generator().manual_seed(seed)
    lengths = experience.scored.rollout.response_lengths
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    minis = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        own = [lengths[row] for row in rows]
        weights = token_weights(own, config.loss_agg_mode, config.max_new_tokens)
        minis.append(MiniBatch(rows, dict(zip(rows, weights, strict=True)), sum(own)))
    return minis


def policy_loss_config(config: Config) -> PolicyLossConfig:
    """The operator's configuration, from keys with the field's names."""
    return PolicyLossConfig(
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        kl_kind=KL_KIND[config.kl_loss_type],
        entropy_coef=config.entropy_coef,
        ratio_level=config.importance_sampling_level,
    )


@dataclass(frozen=True)
class Tokens:
    """Where a micro-batch's tokens are among the rollout's, and what each weighs; both (N,)."""

    index_N: Tensor
    weight_N: Tensor

    @classmethod
    def of(cls, experience: Experience, batch: Batch, mini: MiniBatch) -> Tokens:
        """Made on the host, from lengths that are known there."""
        like = experience.scored.logprob_N
        lengths = experience.scored.rollout.response_lengths
        weight_B = torch.tensor([mini.weights[row] for row in batch.rows], dtype=like.dtype)
        length_B = torch.tensor([lengths[row] for row in batch.rows])
        index_N = token_index(lengths, batch.rows)
        return cls(
            to_device(index_N, like.device),
            to_device(weight_B.repeat_interleave(length_B), like.device),
        )


def actor_loss(
    roles: Roles,
    experience: Experience,
    batch: Batch,
    tokens: Tokens,
    hidden_ND: Tensor,
    config: Config,
    chunk_bytes: int | None = None,
) -> PolicyLoss:
    """The clipped surrogate with its regularisers, of the actor's hidden states."""
    scored, at = experience.scored, tokens.index_N
    head, importance_N = roles.lm_head, experience.importance_weight_N
    return linear_policy_loss(
        hidden_ND.to(head.weight_VD.dtype),
        head.weight_VD,
        batch.token_N,
        scored.logprob_N[at],
        experience.advantage_N[at],
        tokens.weight_N,
        bias_V=head.bias_V,
        softcap=head.softcap,
        temperature=config.temperature,
        ref_logprob_N=scored.ref_logprob_N[at] if config.use_kl_loss else None,
        kl_coef=experience.kl_coef if config.use_kl_loss else None,
        importance_weight_N=None if importance_N is None else importance_N[at],
        offsets=batch.packing.offsets,
        chunk_bytes=chunk_bytes,
        config=policy_loss_config(config),
    )


def critic_loss(
    roles: Roles,
    experience: Experience,
    tokens: Tokens,
    hidden_ND: Tensor,
    config: Config,
    totals: Totals,
) -> Tensor:
    """The clipped value loss, with the values of the rollout as the old ones."""
    old_value_N = experience.scored.value_N
    assert old_value_N is not None
    value = value_loss(
        roles.value(hidden_ND),
        old_value_N[tokens.index_N],
        experience.return_N[tokens.index_N],
        tokens.weight_N,
        clip=config.cliprange_value,
    )
    totals.add("value_loss", value.loss)
    totals.add("value_clipped", value.metrics.clipped_sum)
    return value.loss


def forward_backward(
    roles: Roles,
    experience: Experience,
    batch: Batch,
    mini: MiniBatch,
    config: Config,
    totals: Totals,
    *,
    train_actor: bool = True,
    kept: Kept | None = None,
    chunk_bytes: int | None = None,
) -> None:
    """Forward, loss and backward of one micro-batch; gradients and `totals` are added to.

    A role's backward ends before the next role's forward. `kept` is the actor's forward that
    scoring has kept: if it is of these rows, it takes the place of the actor's forward here.
    """
    tokens = Tokens.of(experience, batch, mini)
    with roles.use("actor"):
        with torch.set_grad_enabled(train_actor):
            actor_BTD = None if kept is None else kept.take(batch.rows)
            if actor_BTD is None:
                actor_BTD = roles.hidden(**batch.inputs)
            actor_ND = batch.packing.gather(actor_BTD)
            policy = actor_loss(roles, experience, batch, tokens, actor_ND, config, chunk_bytes)
        loss = policy.loss
        if roles.has_critic and roles.shares_trunk:
            value = critic_loss(roles, experience, tokens, actor_ND, config, totals)
            loss = loss + config.vf_coef * value
        if loss.requires_grad:
            loss.backward()
    if roles.has_critic and not roles.shares_trunk:
        with roles.use("critic"):
            critic_ND = batch.packing.gather(roles.hidden(**batch.inputs))
            value = critic_loss(roles, experience, tokens, critic_ND, config, totals)
            loss = config.vf_coef * value
            loss.backward()
    stats = policy.metrics
    totals.add("policy_loss", stats.surrogate)
    if config.use_kl_loss:
        totals.add("kl_loss", stats.kl_loss)
    for name in ("count", "ratio_max"):
        totals.add(name, getattr(stats, name))
    for name in ("ratio", "clipped", "approx_kl", "policy_kl", "log_ratio_abs"):
        totals.add(name, getattr(stats, f"{name}_sum"))


def accumulate_gradients(
    roles: Roles,
    experience: Experience,
    mini: MiniBatch,
    config: Config,
    budgets: Budgets,
    *,
    train_actor: bool = True,
) -> Totals:
    """Forward, loss and backward of one optimiser step, in micro-batches as the budget is now.

    Returns:
        The sums of the step's metrics; the gradients are added to the parameters'.
    """
    totals = Totals()
    for batch in batches(experience.scored.rollout, mini.rows, budgets.update):
        forward_backward(
            roles,
            experience,
            batch,
            mini,
            config,
            totals,
            train_actor=train_actor,
            kept=experience.scored.kept,
            chunk_bytes=budgets.chunk_bytes,
        )
    return totals


def release(optimizer: torch.optim.Optimizer, kept: Kept | None) -> None:
    """Release what a failed pass has left: gradients, and the forward that scoring kept."""
    optimizer.zero_grad(set_to_none=True)
    if kept is not None:
        kept.hidden_BTD = None


def check_first_pass(mean_log_ratio: float, precision: Precision) -> None:
    """Before anything was learned the ratio is 1; far from it, every advantage trains nonsense.

    A ratio that is not finite says nothing of that: its step is skipped, and counted.
    """
    limit = 10 * LIMITS[precision].log_ratio
    if limit < mean_log_ratio < math.inf:
        raise TrainingStopped(
            f"mean |log ratio| is {mean_log_ratio:.2g} before the first update, the limit is "
            f"{limit:g} with products in {precision}; the likeliest cause: scoring and update run "
            "different weights, dropout or attention kernels"
        )


def shares_first_pass(config: Config, budgets: Budgets) -> bool:
    """Whether scoring's forward can be the first of the update: the same rows in one micro-batch.

    So it is where an epoch is one optimiser step, and both have the same room.
    """
    return config.ppo_buffer_size == 1 and budgets.update == budgets.scoring


def losses_finite(totals: Totals) -> Tensor:
    """Whether every loss of an optimiser step is a number (0-d bool, on the device)."""
    names = {"policy_loss", "kl_loss", "value_loss", "ptx_loss"} & totals.sums.keys()
    return torch.stack([totals.sums[name].isfinite() for name in sorted(names)]).all()


def update(
    roles: Roles,
    experience: Experience,
    config: Config,
    optimizer: torch.optim.Optimizer,
    *,
    seed: int,
    train_actor: bool = True,
    ptx: Iterator[Batch] | None = None,
    budgets: Budgets | None = None,
    nonfinite_run: float = 0.0,
) -> dict[str, float]:
    """Train on a rollout: `ppo_epochs` passes over it, one optimiser step for each mini-batch.

    The host waits for the device once after the first pass, once at the end, and with
    `early_stopping` once for each optimiser step, to know the KL. An optimiser step that runs out
    of memory is repeated in smaller micro-batches: no weight has moved yet.

    A step whose loss or gradient is not finite is skipped; after `max_bad_steps` of them in a row,
    counted on from `nonfinite_run`, no further step is taken.

    Args:
        train_actor: False trains the critic alone (`critic_warmup`).
        ptx: micro-batches of written answers, one for each optimiser step.
        budgets: sizes of micro-batches; None takes the configuration's.

    Returns:
        The step's metrics, by their names in docs/metrics.md.
    """
    roles.train()
    budgets = budgets or Budgets.of(config)
    scored, lengths = experience.scored, experience.scored.rollout.lengths
    # One call that may run out of memory: forward, loss and backward of all micro-batches.
    accumulate = retry(
        "update",
        budgets,
        used=partial(largest, scored.rollout, budgets.update),
        clean=partial(release, optimizer, scored.kept),
    )(accumulate_gradients)
    totals, first_pass, steps, early_stopped, tokens = Totals(), 0.0, 0, False, 0
    bad_run = torch.tensor(nonfinite_run, device=experience.return_N.device)
    limit = config.max_bad_steps or math.inf
    seeds = [seed_of(seed, "mini-batches", epoch) for epoch in range(config.ppo_epochs)]
    minis = [mini for each in seeds for mini in mini_batches(experience, config, each)]
    for passes, mini in enumerate(minis, 1):
        tokens += sum(lengths[row] for row in mini.rows)
        optimizer.zero_grad(set_to_none=True)
        sums = accumulate(roles, experience, mini, config, budgets, train_actor=train_actor)
        if passes == 1:
            first_pass = sums["log_ratio_abs"].item() / mini.tokens
            check_first_pass(first_pass, roles.product_precision)
        if ptx is not None and train_actor:
            sums.add("ptx_loss", ptx_backward(roles, next(ptx), config.ptx_coef))
        totals.merge(sums)
        if config.early_stopping:
            early_stopped = sums["policy_kl"].item() / mini.tokens > 1.5 * config.target_kl
            if early_stopped:
                break
        # A step whose mean ratio has run away teaches nothing (TRL's ratio_threshold).
        ratio_is_near = sums["ratio"] <= config.ratio_threshold * mini.tokens
        finite, goes_on = losses_finite(sums), bad_run < limit
        norms, taken = clip_and_step(
            optimizer, config.max_grad_norm, keep=ratio_is_near & finite & goes_on
        )
        steps += 1
        for role, norm in norms.items():
            finite = finite & norm.isfinite()
            totals.add(f"grad_norm_{role}", torch.where(taken, norm, 0))
        bad_run = torch.where(finite & goes_on, 0.0, bad_run + 1)
        totals.sums["nonfinite_run"] = bad_run
        totals.add("nonfinite", (~finite).float())
        totals.add("taken", taken.float())
    optimizer.zero_grad(set_to_none=True)
    roles.eval()
    row = means(totals, passes=passes, steps=steps, early_stopped=early_stopped)
    return {"ratio_first_pass": first_pass, "update_tokens": tokens, **row}
