"""Experience -> metrics: PPO's epochs over mini-batches, each split into micro-batches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fastppo.config.ppo import KL_KIND
from fastppo.memory.budgets import Budgets
from fastppo.memory.retry import retry
from fastppo.models.batch import (
    Batch,
    MiniBatch,
    batches,
    largest_micro_batch,
    mini_batches,
    to_device,
    token_index,
)
from fastppo.models.scaler import current_scale, overflows
from fastppo.ops import PolicyLoss, PolicyLossConfig, linear_policy_loss, value_loss
from fastppo.ppo.guards import check_first_pass
from fastppo.ppo.metrics import Totals, means, sums_of_no_pass
from fastppo.ppo.ptx import ptx_backward
from fastppo.run.world import ALONE, World
from fastppo.seeds import seed_of
from fastppo.types import Experience, Kept

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.models.build import Roles
    from fastppo.models.roles import Role
    from fastppo.ppo.state import State


def demonstrations(state: State) -> Iterator[Batch] | None:
    """The batches of `ptx_dataset` for the next update; None without such a data set."""
    first = state.step * state.config.ppo_epochs * state.config.ppo_buffer_size
    return None if state.ptx is None else state.ptx.stream(first, state.roles.device)


def policy_loss_config(config: Config) -> PolicyLossConfig:
    """The configuration of `linear_policy_loss`, from the YAML's keys."""
    return PolicyLossConfig(
        **config.bounds,  # type: ignore[arg-type]
        kl_kind=KL_KIND[config.kl_loss_type],
        entropy_coef=config.entropy_coef,
        tau_pos=config.sapo_temperature_pos,
        tau_neg=config.sapo_temperature_neg,
    )


@dataclass(frozen=True)
class Tokens:
    """Indices of a micro-batch's tokens in the rollout, and their loss weights; both (N,)."""

    index_N: Tensor
    weight_N: Tensor

    @classmethod
    def of(cls, experience: Experience, batch: Batch, mini: MiniBatch) -> Tokens:
        """Compute both on the host, where the lengths are known, and copy them to the device."""
        like = experience.scored.logprob_N
        lengths = experience.scored.rollout.response_lengths
        weight_B = torch.tensor([mini.weights[row] for row in batch.rows], dtype=like.dtype)
        length_B = torch.tensor([lengths[row] for row in batch.rows])
        index_N = token_index(lengths, batch.rows)
        weight_N = weight_B.repeat_interleave(length_B)
        return cls(to_device(index_N, like.device), to_device(weight_N, like.device))


def actor_loss(
    roles: Roles,
    experience: Experience,
    batch: Batch,
    tokens: Tokens,
    hidden_ND: Tensor,
    config: Config,
    chunk_bytes: int | None = None,
    loss_scale: Tensor | None = None,
) -> PolicyLoss:
    """The policy loss with its KL and entropy terms, from the actor's hidden states.

    Its gradients are computed together with it, in the head's dtype; with fp16 they are
    `loss_scale` times as large.
    """
    scored, at = experience.scored, tokens.index_N
    head, importance_N = roles.lm_head, experience.importance_weight_N
    return linear_policy_loss(
        hidden_ND.to(head.weight_VD.dtype),
        head.weight_VD,
        batch.token_N,
        scored.logprob_N[at],
        experience.advantage_N[at],
        tokens.weight_N,
        loss=config.token_loss,
        bias_V=head.bias_V,
        softcap=head.softcap,
        temperature=config.temperature,
        logit_scale=head.scale,
        ref_logprob_N=scored.ref_logprob_N[at] if config.use_kl_loss else None,
        kl_coef=experience.kl_coef if config.use_kl_loss else None,
        importance_weight_N=None if importance_N is None else importance_N[at],
        offsets=batch.packing.offsets,
        chunk_bytes=chunk_bytes,
        grad_scale=loss_scale,
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
    """The clipped value loss, from the critic's hidden states; adds its metrics to `totals`."""
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
    loss_scale: Tensor | None = None,
) -> None:
    """Forward, loss and backward of one micro-batch; adds to the gradients and to `totals`.

    A role's backward ends before the next role's forward. A forward of these rows that scoring has
    kept is used in place of a new one.
    Gradients are `loss_scale` times as large; the losses in `totals` are not.
    """
    tokens = Tokens.of(experience, batch, mini)

    def hidden(role: Role) -> Tensor:
        found = None if kept is None else kept.take(role, batch.rows)
        return batch.packing.gather(roles.hidden(**batch.inputs) if found is None else found)

    with roles.use("actor"):
        with torch.set_grad_enabled(train_actor):
            actor_ND = hidden("actor")
            policy = actor_loss(
                roles, experience, batch, tokens, actor_ND, config, chunk_bytes, loss_scale
            )
        loss = policy.loss
        if roles.has_critic and roles.shares_trunk:
            value = critic_loss(roles, experience, tokens, actor_ND, config, totals)
            loss = loss + config.vf_coef * value
        if loss.requires_grad:
            (loss if loss_scale is None else loss * loss_scale).backward()  # type: ignore[no-untyped-call]
    if roles.has_critic and not roles.shares_trunk:
        with roles.use("critic"):
            critic_ND = hidden("critic")
            value = critic_loss(roles, experience, tokens, critic_ND, config, totals)
            loss = config.vf_coef * value
            (loss if loss_scale is None else loss * loss_scale).backward()  # type: ignore[no-untyped-call]
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
    loss_scale: Tensor | None = None,
) -> Totals:
    """Forward, loss and backward of one optimiser step, in micro-batches within `budgets.update`.

    Gradients are added to the `grad` of the parameters. Of several processes each runs its own
    rows of the mini-batch, possibly none.

    Returns:
        The sums of the step's metrics.
    """
    totals, own = Totals(), experience.scored.own
    rows = mini.rows if own is None else [row for row in mini.rows if row in own]
    made, sharding = batches(experience.scored.rollout, rows, budgets.update), roles.sharding
    if (kept := experience.scored.kept) is not None:
        kept.retain(batch.rows for batch in made)
    missing = 0 if sharding is None else sharding.missing(len(made))
    for batch in made:
        forward_backward(
            roles,
            experience,
            batch,
            mini,
            config,
            totals,
            train_actor=train_actor,
            kept=kept,
            chunk_bytes=budgets.chunk_bytes,
            loss_scale=loss_scale,
        )
    if sharding is not None:
        sharding.idle_update(missing, train_actor=train_actor)
    return totals


def release(optimizer: torch.optim.Optimizer, kept: Kept | None) -> None:
    """Release the gradients of a failed pass, and the forwards that scoring kept."""
    optimizer.zero_grad(set_to_none=True)
    if kept is not None:
        kept.retain([])


def clip_and_step(
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    keep: Tensor,
    scaler: GradScaler | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Clip the gradients of each role by the role's own norm; then step, unless `keep` is False.

    With one norm for both, a critic far from its target would shrink the actor's step. If `keep`
    (0-d bool) is False or a gradient is not finite, weights and Adam's moments stay unchanged.
    PyTorch's fused AdamW checks that on the device; for another optimiser the host waits for the
    result.

    With a `scaler`, gradients are divided by its scale first, and the scale is updated.

    Returns:
        Role -> norm of its gradients before clipping (0-d), and whether the step was taken
        (0-d bool).
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    limit = max_grad_norm if max_grad_norm > 0 else float("inf")
    owned: dict[str, list[nn.Parameter]] = defaultdict(list)
    for group in optimizer.param_groups:
        owned[group["role"]] += [p for p in group["params"] if p.grad is not None]
    norms = {role: nn.utils.clip_grad_norm_(own, limit) for role, own in owned.items() if own}
    taken = keep
    for norm in norms.values():
        taken = taken & norm.isfinite()
    if optimizer.defaults.get("fused"):
        # As torch.amp.GradScaler does: if found_inf is 1, the fused kernels write nothing.
        optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif taken.item():
        optimizer.step()
    if scaler is not None:
        scaler.update()
    return norms, taken


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
    scaler: GradScaler | None = None,
    world: World = ALONE,
) -> dict[str, float]:
    """Train on a rollout: `ppo_epochs` passes over it, one optimiser step for each mini-batch.

    The host waits for the device once after the first pass, once at the end, and with
    `early_stopping` once for each optimiser step, to read the KL. If the forward and backward of an
    optimiser step run out of memory, they are repeated in smaller micro-batches.

    An optimiser step whose loss or gradient is not finite is skipped; after `max_bad_steps` skipped
    steps in a row, no further step is taken. With fp16 a step whose gradient overflows only because
    of the loss scale is skipped too, and counted separately.

    Args:
        seed: of the order of the rows.
        train_actor: False trains the critic alone (`critic_warmup`).
        ptx: micro-batches of human answers, one for each optimiser step.
        budgets: limits of micro-batches; None uses the configuration's.
        nonfinite_run: number of skipped steps in a row before this update.
        scaler: the loss scaler, with fp16.
        world: the run's processes; gradients, losses and decisions are those of all their rows.

    Returns:
        The step's metrics, by the names of docs/metrics.md.
    """
    roles.train()
    budgets = budgets or Budgets.of(config)
    scored, lengths = experience.scored, experience.scored.rollout.lengths
    # Only this call may run out of memory: forward, loss and backward of all micro-batches.
    accumulate = retry(
        "update",
        budgets,
        used=partial(largest_micro_batch, scored.rollout, budgets.update, scored.own),
        clean=partial(release, optimizer, scored.kept),
    )(accumulate_gradients)
    totals, first_pass, steps, early_stopped, tokens = Totals(), 0.0, 0, False, 0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    bad_run = torch.tensor(nonfinite_run, device=experience.return_N.device)
    limit = config.max_bad_steps or math.inf
    seeds = [seed_of(seed, "mini-batches", epoch) for epoch in range(config.ppo_epochs)]
    minis = [mini for each in seeds for mini in mini_batches(experience, config, each)]
    passes = 0
    if not minis:  # all rows are left out
        totals = sums_of_no_pass(config, bad_run)
    for passes, mini in enumerate(minis, 1):
        tokens += sum(lengths[row] for row in mini.rows)
        optimizer.zero_grad(set_to_none=True)
        scale = None if scaler is None else current_scale(scaler, bad_run.device)
        sums = accumulate(
            roles, experience, mini, config, budgets, train_actor=train_actor, loss_scale=scale
        )
        if ptx is not None and train_actor:
            batch = next(ptx)
            if passes % world.size == world.rank:
                sums.add("ptx_loss", ptx_backward(roles, batch, config.ptx_coef, loss_scale=scale))
            elif roles.sharding is not None:
                with roles.use("actor"):
                    roles.sharding.idle(1, backward=True)
        sums = sums.reduce(world, bad_run.device)
        world.sum_gradients(parameters)
        if passes == 1:
            first_pass = sums["log_ratio_abs"].item() / mini.tokens
            check_first_pass(first_pass, roles.product_precision)
        totals.merge(sums)
        if config.early_stopping:
            early_stopped = sums["policy_kl"].item() / mini.tokens > 1.5 * config.target_kl
            if early_stopped:
                break
        # A step with a mean ratio above ratio_threshold is skipped, as in TRL.
        ratio_is_near = sums["ratio"] <= config.ratio_threshold * mini.tokens
        finite_loss, goes_on = sums.losses_finite(), bad_run < limit
        norms, taken = clip_and_step(
            optimizer, config.max_grad_norm, ratio_is_near & finite_loss & goes_on, scaler
        )
        steps += 1
        finite_gradient = torch.ones_like(finite_loss)
        for role, norm in norms.items():
            finite_gradient = finite_gradient & norm.isfinite()
            totals.add(f"grad_norm_{role}", torch.where(taken, norm, 0))
        overflow = torch.zeros_like(finite_loss)
        if scale is not None:
            overflow = overflows(finite_loss, finite_gradient, scale)
        finite = finite_loss & (finite_gradient | overflow)
        # An overflow neither counts as a bad step nor ends a row of them.
        bad_run = torch.where(finite & goes_on, torch.where(overflow, bad_run, 0.0), bad_run + 1)
        totals.add("overflow", overflow.float())
        totals.sums["nonfinite_run"] = bad_run
        totals.add("nonfinite", (~finite).float())
        totals.add("taken", taken.float())
    optimizer.zero_grad(set_to_none=True)
    roles.eval()
    if scaler is not None:
        totals.sums["loss_scale"] = current_scale(scaler, bad_run.device)
    row = means(totals, passes=passes, steps=steps, early_stopped=early_stopped)
    return {"ratio_first_pass": first_pass, "update_tokens": tokens, **row}
