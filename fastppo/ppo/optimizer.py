"""AdamW over the trained roles, and a step that the device itself can call off."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from fastppo.errors import UserError
from fastppo.models.optim import create_optimizer, start_warmup_above_zero

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.models.build import Role, Roles


def make_optimizer(config: Config, roles: Roles) -> torch.optim.Optimizer:
    """AdamW over the actor's parameters and, where there is one, the critic's: a group each.

    With LoRA+ two each.
    """
    groups = role_groups(config, roles, "actor", config.learning_rate)
    if roles.has_critic:
        rate = config.critic_learning_rate
        rate = config.learning_rate if rate is None else rate
        groups += role_groups(config, roles, "critic", rate)
    if config.weight_decay:
        groups = [part for group in groups for part in vectors_apart(group)]
    return create_optimizer(
        config.optim or "adamw_torch_fused",  # the one that reads found_inf, see below
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def role_groups(config: Config, roles: Roles, role: Role, rate: float) -> list[dict[str, Any]]:
    """A role's parameters; with `loraplus_lr_ratio` those that start at 0 learn so much faster.

    Source: Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models. As in PEFT and
    LLaMA-Factory, vectors (DoRA's magnitudes) go with the B matrices.
    """
    parameters, ratio = roles.trained_parameters(role), config.loraplus_lr_ratio
    if ratio is None:
        return [{"role": role, "params": parameters, "lr": rate}]
    fast = {
        parameter
        for name, parameter in roles.places[role].model.named_parameters()
        if "lora_B" in name or parameter.dim() == 1
    }
    slow, quick = ([p for p in parameters if (p in fast) is which] for which in (False, True))
    groups = [
        {"role": role, "params": slow, "lr": rate},
        {"role": role, "params": quick, "lr": rate * ratio},
    ]
    return [group for group in groups if group["params"]]


def vectors_apart(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group's matrices, and its vectors undecayed: biases and norms, as transformers has it."""
    flat = [p for p in group["params"] if p.dim() == 1]
    full = [p for p in group["params"] if p.dim() != 1]
    parts = [{**group, "params": full}, {**group, "params": flat, "weight_decay": 0.0}]
    return [part for part in parts if part["params"]]


def make_scheduler(config: Config, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """`lr_scheduler_type` over `steps` PPO steps; a warm-up begins above 0.

    Raises:
        UserError: lr_scheduler_kwargs has a value that the schedule does not take.
    """
    warmup = config.warmup(steps)
    try:
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            warmup,
            max(steps, warmup + 1),  # polynomial divides by what is left behind the warm-up
            config.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"lr_scheduler_kwargs: {error}; change it, or leave it out") from None
    start_warmup_above_zero(scheduler, warmup)
    return scheduler


def idle_steps(scheduler: Any, steps: int) -> int:
    """How many of `steps` PPO steps learn nothing, their learning rate being 0 in every group."""
    groups = list(zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True))
    return sum(all(rate * factor(step) <= 0 for rate, factor in groups) for step in range(steps))


def clip_and_step(
    optimizer: torch.optim.Optimizer, max_grad_norm: float, keep: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Clip each role by its own norm, once, after the last micro-batch; then step, or not.

    Actor and critic apart: a critic far from its target would otherwise shrink the actor's step.
    Where `keep` (0-d bool) is False, or a gradient is not finite, weights and moments stay as they
    were. With PyTorch's fused AdamW the device decides that and the host does not wait; another
    optimiser has to be told by the host.

    Returns:
        Norms before clipping, by role (0-d, of those that have a gradient), and whether the step
        was taken (0-d bool).
    """
    limit = max_grad_norm if max_grad_norm > 0 else float("inf")
    owned: dict[str, list[nn.Parameter]] = defaultdict(list)
    for group in optimizer.param_groups:
        owned[group["role"]] += [p for p in group["params"] if p.grad is not None]
    norms = {role: nn.utils.clip_grad_norm_(own, limit) for role, own in owned.items() if own}
    taken = keep
    for norm in norms.values():
        taken = taken & norm.isfinite()
    if optimizer.defaults.get("fused"):
        # GradScaler's way to a fused optimiser: where this is 1, its kernels write nothing.
        optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif taken.item():
        optimizer.step()
    return norms, taken
