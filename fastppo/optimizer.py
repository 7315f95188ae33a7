"""AdamW over the trained roles, and a step that the device itself can call off."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastppo.optim import adamw

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.roles import Roles


def make_optimizer(config: Config, roles: Roles) -> torch.optim.Optimizer:
    """AdamW over a group each for the actor's parameters and, where there is one, the critic's."""
    groups = [
        {
            "role": "actor",
            "params": roles.trained_parameters("actor"),
            "lr": config.learning_rate,
        }
    ]
    if roles.has_critic:
        rate = config.critic_learning_rate
        groups.append(
            {
                "role": "critic",
                "params": roles.trained_parameters("critic"),
                "lr": config.learning_rate if rate is None else rate,
            }
        )
    return adamw(
        config.optim or "adamw_torch_fused",  # the one that reads found_inf, see below
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


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
