"""What gives a finished response its score: one reward, or several by weight."""

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
from fastppo.memory.retry import retried
from fastppo.models.batch import largest_micro_batch
from fastppo.rewards.adapter import AdapterReward
from fastppo.rewards.function import FunctionReward
from fastppo.rewards.model import ClassifierReward, load_full
from fastppo.rewards.server import ApiReward
from fastppo.types import Prompt, Rollout

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.models.build import Roles
    from fastppo.templates import Template

Part = Callable[[Rollout], Tensor]


@dataclass
class Reward:
    """score_b = sum over the rewards that apply to response b of weight * their score."""

    specs: tuple[RewardSpec, ...]
    parts: tuple[Part, ...]
    budgets: Budgets | None = None  # of the run; None: a model that runs out of memory stops it
    worked: bool = False

    @property
    def names(self) -> list[str]:
        """The rewards' names, in the order of the YAML."""
        return [spec.name for spec in self.specs]

    @property
    def extra_names(self) -> list[str]:
        """The names that have columns of their own: of one reward, `score` is all there is."""
        return self.names if len(self.specs) > 1 else []

    def __call__(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """The score (B,) float32, and each reward's own (B,), NaN where it does not apply.

        A reward that fails the first time is the user's to mend: UserError. One that has worked
        and then fails stops the run: TrainingStopped.
        """
        try:
            result = self.judge(rollout)
        except UserError as error:
            if self.worked:
                raise TrainingStopped(str(error)) from None
            raise
        self.worked = True
        return result

    def judge(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, with a UserError for whatever fails."""
        parts: dict[str, Tensor] = {}
        device = rollout.input_ids_BT.device
        score_B = torch.zeros(len(rollout.prompts), device=device)
        applies_B = torch.zeros(len(rollout.prompts), dtype=torch.bool, device=device)
        for spec, part in zip(self.specs, self.parts, strict=True):
            part_B = self.ask(spec, part, rollout).float()
            if spec.kind != "function" and not part_B.isfinite().all():
                raise TrainingStopped(
                    f"reward '{spec.name}' gave a score that is not finite; the likeliest cause: "
                    "its weights are broken, or overflow in bf16"
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

    def ask(self, spec: RewardSpec, part: Part, rollout: Rollout) -> Tensor:
        """One reward's scores (B,): a model on the device once more where it ran out of memory.

        A server or a function is asked once: it bills, counts or draws each time.
        """
        if self.budgets is None or spec.kind not in ("lora", "full"):
            return part(rollout)
        used = partial(largest_micro_batch, rollout, self.budgets.scoring)
        return retried("score", self.budgets, partial(part, rollout), used=used)

    def table(self) -> str:
        """What they are, in words, for the first lines of a run."""
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
    """The rewards that the YAML names, each tried on a prompt where it can be.

    They keep `budgets`, and look into them at each call; None are the file's own.
    """
    budgets = budgets or Budgets.of(config)
    budget = budgets.scoring
    size = config.per_device_train_batch_size
    parts: list[Part] = []
    adapters = iter(config.reward_adapters)
    for spec in config.rewards:
        if spec.kind == "lora":
            folder = Path(spec.target)
            parts.append(AdapterReward(roles, folder, template, budget, next(adapters)))
        elif spec.kind == "full":
            full = load_full(spec.target, config, roles.device, template, budget)
            if isinstance(full, ClassifierReward):
                for truncated in (False, True):
                    full.encode(prompts[0], "", truncated=truncated)
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
            parts.append(FunctionReward(spec.target, prompts))
    return Reward(config.rewards, tuple(parts), budgets)


def mean_score(part_B: Tensor) -> float | None:
    """Mean over the responses that a reward applies to; None where it applies to none."""
    mean = part_B.nanmean().item()
    return None if math.isnan(mean) else mean
