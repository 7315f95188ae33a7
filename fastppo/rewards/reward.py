"""The score of a response: one reward, or a weighted sum of several rewards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastppo.config.rewards import RewardSpec
from fastppo.errors import TrainingStopped, UserError
from fastppo.memory.budgets import Budgets
from fastppo.memory.retry import retry
from fastppo.models.batch import largest_micro_batch
from fastppo.rewards.adapter import AdapterReward
from fastppo.rewards.classifier import ClassifierReward
from fastppo.rewards.function import FunctionReward
from fastppo.rewards.model import load_full
from fastppo.rewards.server import ApiReward
from fastppo.types import Prompt, Rollout

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.models.build import Roles
    from fastppo.run.sharding import Sharding
    from fastppo.templates import Template

RewardFunction = Callable[[Rollout], Tensor]  # scores (B,), NaN if it does not apply


@dataclass
class Reward:
    """The rewards of a run, called with a rollout.

    score_b = sum of weight * score over the rewards that apply to response b
    """

    specs: tuple[RewardSpec, ...]
    parts: tuple[RewardFunction, ...]
    budgets: Budgets | None = None  # None: running out of memory is not retried
    has_worked: bool = False  # whether a rollout has been scored

    @property
    def names(self) -> list[str]:
        """The rewards' names, in the YAML's order."""
        return [spec.name for spec in self.specs]

    @property
    def extra_names(self) -> list[str]:
        """Names of the rewards with their own metrics: all if there are several, else none."""
        return self.names if len(self.specs) > 1 else []

    def __call__(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted score, (B,) float32, and each reward's scores (B,), NaN if not applicable.

        Raises:
            UserError: a reward failed in the first rollout, so its setting is wrong.
            TrainingStopped: a reward failed that has worked before.
        """
        try:
            result = self.score(rollout)
        except UserError as error:
            if self.has_worked:
                raise TrainingStopped(str(error)) from None
            raise
        self.has_worked = True
        return result

    def score(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Like calling the object, but every failure of a reward raises UserError."""
        parts: dict[str, Tensor] = {}
        device = rollout.input_ids_BT.device
        score_B = torch.zeros(len(rollout.prompts), device=device)
        applies_B = torch.zeros(len(rollout.prompts), dtype=torch.bool, device=device)
        for spec, part in zip(self.specs, self.parts, strict=True):
            part_B = self.score_part(spec, part, rollout).float()
            if spec.kind != "function" and not part_B.isfinite().all():
                raise TrainingStopped(
                    f"reward '{spec.name}' gave a score that is not finite; the likeliest cause: "
                    "its weights are broken, or overflow in 16 bits"
                )
            known_B = ~part_B.isnan()
            score_B = score_B + spec.weight * part_B.masked_fill(~known_B, 0.0)
            applies_B |= known_B
            parts[spec.name] = part_B
        if not applies_B.all():
            row = applies_B.tolist().index(False)
            raise UserError(
                f"reward_model: no reward applies to {rollout.prompts[row].text[:80]!r}; give its "
                f"completion a number in {' or '.join(self.names)}"
            )
        return score_B, parts

    def score_part(self, spec: RewardSpec, part: RewardFunction, rollout: Rollout) -> Tensor:
        """The scores (B,) of one reward; a model is called again if it runs out of memory.

        A server or function is called only once: a second call may cost money or score differently.
        """
        if self.budgets is None or spec.kind not in ("lora", "full"):
            return part(rollout)
        used = partial(largest_micro_batch, rollout, self.budgets.scoring)
        return retry("score", self.budgets, used=used)(part)(rollout)

    def join_passes(self, sharding: Sharding) -> None:
        """Take part in other processes' passes over the sharded base, without rows to score."""
        for spec in self.specs:
            if spec.kind == "lora":
                sharding.idle(sharding.missing(0))

    def table(self) -> str:
        """A line for each reward with its weight and description, for the first lines of a run."""
        words = {
            "lora": "base + LoRA '{}' + head",
            "full": "model '{}'",
            "api": "server '{}'",
            "function": "function '{}'",
        }
        lines = []
        for spec in self.specs:
            weight = "" if spec.weight == 1.0 else f"{spec.weight:g} x "
            lines.append(weight + words[spec.kind].format(spec.name))
        return "\n".join(lines)


def make_reward(
    config: Config,
    roles: Roles,
    template: Template,
    tokenizer: Any,
    prompts: list[Prompt],
    budgets: Budgets | None = None,
) -> Reward:
    """The rewards that the configuration names; servers and chat templates are tried on a prompt.

    Args:
        roles: the run's roles, with the rewards that are adapters.
        prompts: the training prompts, with the columns that functions may use.
        budgets: limits of micro-batches, read at each call; None uses the configuration's.
    """
    budgets = budgets or Budgets.of(config)
    budget = budgets.scoring
    size = config.per_device_train_batch_size
    parts: list[RewardFunction] = []
    adapters = iter(config.reward_adapters)
    for spec in config.rewards:
        if spec.kind == "lora":
            folder = Path(spec.target)
            parts.append(AdapterReward(roles, folder, template, budget, next(adapters)))
        elif spec.kind == "full":
            full = load_full(spec.target, config, roles.device, template, budget)
            if isinstance(full, ClassifierReward):
                full.check([full.encode(prompts[0], "", truncated=x) for x in (False, True)])
            parts.append(full)
        elif spec.kind == "api":
            api = ApiReward(
                spec.target,
                tokenizer,
                timeout=config.reward_api_timeout,
                retries=config.reward_api_retries,
                batch_size=size,
            )
            api.scores([tokenizer.decode(prompts[0].ids)])
            parts.append(api)
        else:
            given = config.objects.rewards.get(spec.target)
            parts.append(FunctionReward(spec.target, prompts, given))
    return Reward(config.rewards, tuple(parts), budgets)


def mean_score(part_B: Tensor) -> float | None:
    """Mean of the scores without NaN (not applicable); None if all are NaN."""
    mean = part_B.nanmean().item()
    return None if math.isnan(mean) else mean
