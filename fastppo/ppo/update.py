"""Experience -> metrics: PPO's epochs over mini-batches and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.config.ppo import KL_KIND
from fastppo.errors import TrainingStopped
from fastppo.memory.budgets import Budgets
from fastppo.memory.retry import retried
from fastppo.models.batch import Batch, batches, largest_micro_batch, to_device, token_index
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


def backward(
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
    """Losses and gradients of one micro-batch; a role's backward ends before the next's forward.

    What scoring `kept` of these rows, before any weight moved, takes the place of the forward.
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
            (config.vf_coef * value).backward()
    stats = policy.metrics
    totals.add("policy_loss", stats.surrogate)
    if config.use_kl_loss:
        totals.add("kl_loss", stats.kl_loss)
    for name in ("count", "ratio_max"):
        totals.add(name, getattr(stats, name))
    for name in ("ratio", "clipped", "approx_kl", "policy_kl", "log_ratio_abs"):
        totals.add(name, getattr(stats, f"{name}_sum"))


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


@dataclass
class Passes:
    """Losses and gradients of one optimiser step after another, each by micro-batches."""

    roles: Roles
    experience: Experience
    config: Config
    budgets: Budgets
    train_actor: bool
    # One mini-batch has the same micro-batches in every epoch.
    layouts: dict[tuple[int, ...], list[Batch]] = field(default_factory=dict)

    def micro_batches(self, mini: MiniBatch) -> list[Batch]:
        """As large as the budget is now."""
        rows = tuple(sorted(mini.rows))
        if rows not in self.layouts:
            rollout = self.experience.scored.rollout
            self.layouts = {rows: batches(rollout, mini.rows, self.budgets.update)}
        return self.layouts[rows]

    def __call__(self, mini: MiniBatch) -> Totals:
        """Gradients are added to what is there."""
        totals, kept = Totals(), self.experience.scored.kept
        for batch in self.micro_batches(mini):
            backward(
                self.roles,
                self.experience,
                batch,
                mini,
                self.config,
                totals,
                train_actor=self.train_actor,
                kept=kept,
                chunk_bytes=self.budgets.chunk_bytes,
            )
        return totals

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """Let go of gradients, of a kept forward, and of micro-batches that were too large."""
        optimizer.zero_grad(set_to_none=True)
        self.layouts = {}
        if self.experience.scored.kept is not None:
            self.experience.scored.kept.hidden_BTD = None


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
    """Learn from a rollout: `ppo_epochs` passes over it, an optimiser step a mini-batch.

    The host waits for the device once for the first pass, once at the end, and once an optimiser
    step where `early_stopping` has to know the KL. An optimiser step that runs out of memory is
    begun anew with smaller micro-batches: nothing has moved yet. `budgets` are the file's where
    none are given.

    A step whose loss or gradient is not finite is skipped; after `max_bad_steps` of them in a row,
    `nonfinite_run` from before counted in, no step is taken any more.
    """
    roles.train()
    budgets = budgets or Budgets.of(config)
    totals, first_pass, steps, early_stopped, tokens = Totals(), 0.0, 0, False, 0
    rollout = experience.scored.rollout
    gradients = Passes(roles, experience, config, budgets, train_actor)
    clear = partial(gradients.clear, optimizer)
    used = partial(largest_micro_batch, rollout, budgets.update)
    bad_run = torch.tensor(nonfinite_run, device=experience.return_N.device)
    limit = config.max_bad_steps or math.inf
    seeds = [seed_of(seed, "mini-batches", epoch) for epoch in range(config.ppo_epochs)]
    epochs = [mini_batches(experience, config, each) for each in seeds]
    for passes, mini in enumerate(chain.from_iterable(epochs), 1):
        optimizer.zero_grad(set_to_none=True)
        tokens += sum(rollout.lengths[row] for row in mini.rows)
        own = retried("update", budgets, partial(gradients, mini), used=used, clean=clear)
        if passes == 1:
            first_pass = own.sums["log_ratio_abs"].item() / mini.tokens
            check_first_pass(first_pass, roles.product_precision)
        if ptx is not None and train_actor:
            own.add("ptx_loss", ptx_backward(roles, next(ptx), config.ptx_coef))
        totals.merge(own)
        if config.early_stopping:
            early_stopped = own.sums["policy_kl"].item() / mini.tokens > 1.5 * config.target_kl
            if early_stopped:
                break
        # A step whose mean ratio has run away teaches nothing (TRL's ratio_threshold).
        keep = own.sums["ratio"] <= config.ratio_threshold * mini.tokens
        finite = losses_finite(own)
        keep = keep & finite & (bad_run < limit)
        norms, taken = clip_and_step(optimizer, config.max_grad_norm, keep)
        steps += 1
        for norm in norms.values():
            finite = finite & norm.isfinite()
        bad_run = torch.where(finite & (bad_run < limit), 0.0, bad_run + 1)
        totals.add("nonfinite", (~finite).float())
        totals.sums["nonfinite_run"] = bad_run
        totals.add("taken", taken.float())
        for role, norm in norms.items():
            totals.add(f"grad_norm_{role}", torch.where(taken, norm, 0))
    optimizer.zero_grad(set_to_none=True)
    roles.eval()
    row = means(totals, passes=passes, steps=steps, early_stopped=early_stopped)
    return {"ratio_first_pass": first_pass, "update_tokens": tokens, **row}
