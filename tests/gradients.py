"""The gradient of one optimiser step, for tests that compare ways of computing it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.config import Config
from fastppo.memory.budgets import Budget
from fastppo.models.batch import batches
from fastppo.models.build import Roles
from fastppo.ppo.update import Totals, forward_backward, mini_batches
from fastppo.types import Experience


def gradient(made: Roles, experience: Experience, settings: Config, budget: Budget) -> Tensor:
    """Of one optimiser step over all rows, in micro-batches of `budget`."""
    both = [*made.trainable_parameters("actor"), *made.trainable_parameters("critic")]
    for parameter in both:
        parameter.grad = None
    (mini,) = mini_batches(experience, settings, seed=0)
    for batch in batches(experience.scored.rollout, mini.rows, budget):
        forward_backward(made, experience, batch, mini, settings, Totals())
    return torch.cat([p.grad.flatten() for p in both if p.grad is not None])
