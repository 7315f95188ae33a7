"""The optimiser, with a parameter group for each role, and its learning rate schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import get_scheduler

from fastppo.errors import UserError
from fastppo.models.optim import create_optimizer, start_warmup_above_zero

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.models.build import Role, Roles


def make_optimizer(config: Config, roles: Roles) -> torch.optim.Optimizer:
    """The optimiser that `optim` names, with one parameter group for the actor, one for the critic.

    With LoRA+ each role has two groups.
    """
    groups = role_groups(config, roles, "actor", config.learning_rate)
    if roles.has_critic:
        rate = config.critic_learning_rate
        rate = config.learning_rate if rate is None else rate
        groups += role_groups(config, roles, "critic", rate)
    if config.weight_decay:
        groups = [part for group in groups for part in split_no_decay(group)]
    return create_optimizer(
        config.optim or "adamw_torch_fused",  # reads found_inf, see clip_and_step
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def role_groups(config: Config, roles: Roles, role: Role, rate: float) -> list[dict[str, Any]]:
    """Parameter groups of a role; `loraplus_lr_ratio` multiplies the rate of LoRA's B matrices.

    Source: Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models. As in PEFT and
    LLaMA-Factory, vectors (DoRA's magnitudes) are in the group of the B matrices.
    """
    parameters, ratio = roles.trainable_parameters(role), config.loraplus_lr_ratio
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


def split_no_decay(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a group in two: vectors (biases, norms) get no weight decay, as in transformers."""
    flat = [p for p in group["params"] if p.dim() == 1]
    full = [p for p in group["params"] if p.dim() != 1]
    parts = [{**group, "params": full}, {**group, "params": flat, "weight_decay": 0.0}]
    return [part for part in parts if part["params"]]


def make_scheduler(config: Config, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The `lr_scheduler_type` schedule over `steps` PPO steps; a warm-up begins above 0.

    Raises:
        UserError: lr_scheduler_kwargs has a value that the schedule does not accept.
    """
    warmup = config.warmup(steps)
    try:
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            warmup,
            max(steps, warmup + 1),  # polynomial divides by the number of steps after the warm-up
            config.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"lr_scheduler_kwargs: {error}; change it, or leave it out") from None
    start_warmup_above_zero(scheduler, warmup)
    return scheduler


def idle_steps(scheduler: Any, steps: int) -> int:
    """How many of the next `steps` PPO steps have a learning rate of 0 in every group."""
    groups = list(zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True))
    return sum(all(rate * factor(step) <= 0 for rate, factor in groups) for step in range(steps))
