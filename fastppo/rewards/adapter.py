"""Scores by a value head on hidden states, at the token at which the head was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastppo.config.rewards import RECORD
from fastppo.errors import UserError
from fastppo.memory.budgets import Budget
from fastppo.models.batch import Batch, Order, batches
from fastppo.types import Rollout

if TYPE_CHECKING:
    from fastppo.models.build import Roles
    from fastppo.run.sharding import Sharding
    from fastppo.templates import Template


class HeadReward:
    """Scores the policy's own tokens with a value head; returns (B,) float32.

    The score is read at the last token. For a head of stage rm that is EOS; stage rm records that
    in its folder. LLaMA-Factory's templates write a suffix after EOS ("\\n" in the chatml family),
    and its reward models are read at the suffix: for those (and heads trained further from them)
    the suffix is appended first.

    Args:
        hidden: function from a micro-batch to its last hidden states (B, T, D).
        head: linear layer from a hidden state to the score.
        folder: the folder of the head, with the record of stage rm if there is one; None for a
            model that was given as an object, which is scored at EOS.
        template: the policy's, for its suffix and padding.
        budget: limits of a micro-batch.
        packs: whether `hidden` accepts packed micro-batches.
        sharding: of the model that `hidden` runs, whose passes all processes make together.
    """

    def __init__(
        self,
        hidden: Callable[[Batch], Tensor],
        head: nn.Linear,
        folder: Path | None,
        template: Template,
        budget: Budget,
        *,
        packs: bool = True,
        sharding: Sharding | None = None,
    ) -> None:
        self.hidden, self.head, self.packs, self.sharding = hidden, head, packs, sharding
        self.template, self.budget = template, budget
        recorded = "eos" if folder is None else read_score_at(folder)
        self.score_at = recorded or ("suffix" if template.suffix_ids else "eos")

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        if self.score_at == "suffix":
            rollout = append_suffix(rollout, list(self.template.suffix_ids), self.template.pad_id)
        budget = self.budget if self.packs else self.budget.padded
        micro_batches = batches(rollout, range(len(rollout.prompts)), budget)
        missing = 0 if self.sharding is None else self.sharding.missing(len(micro_batches))
        scores = [
            self.head(batch.last(self.hidden(batch)).float()).squeeze(-1) for batch in micro_batches
        ]
        if self.sharding is not None:
            self.sharding.idle(missing)
        return Order.of(rollout, micro_batches).rows(scores)


class AdapterReward(HeadReward):
    """Scores by the reward adapter of stage rm, or of LLaMA-Factory, on the policy's base.

    `role` is the reward's role in `roles`, which holds the adapter and its head.
    """

    def __init__(
        self, roles: Roles, folder: Path, template: Template, budget: Budget, role: str = "reward"
    ) -> None:
        self.roles, self.role = roles, role
        head, sharding = roles.reward_heads[role], roles.sharding
        super().__init__(self._hidden, head, folder, template, budget, sharding=sharding)

    def _hidden(self, batch: Batch) -> Tensor:
        with self.roles.use(self.role):
            return self.roles.hidden(**batch.inputs)


def read_score_at(folder: Path) -> str | None:
    """The token at which the model in `folder` is scored, as stage rm recorded it: eos or suffix.

    None if there is no record, as in LLaMA-Factory's folders.
    """
    record = folder / RECORD
    if not record.is_file():
        return None
    try:
        score_at = json.loads(record.read_text(encoding="utf-8"))["score_at"]
    except (ValueError, KeyError, TypeError):
        score_at = None
    if score_at not in ("eos", "suffix"):
        raise UserError(
            f"reward_model: {record} does not say score_at eos or suffix; train it again, or "
            "delete that file where the model is LLaMA-Factory's"
        )
    return str(score_at)


def append_suffix(rollout: Rollout, suffix_ids: list[int], pad_id: int) -> Rollout:
    """A copy of the rollout with `suffix_ids` appended to each response that is not truncated."""
    rows = []
    for row, length, ended in zip(
        rollout.input_ids_BT.tolist(), rollout.lengths, rollout.terminated, strict=True
    ):
        rows.append(row[:length] + (suffix_ids if ended else []))
    width = max(map(len, rows))
    response_lengths = [
        n + (len(suffix_ids) if ended else 0)
        for n, ended in zip(rollout.response_lengths, rollout.terminated, strict=True)
    ]
    ids_BT = torch.tensor(
        [row + [pad_id] * (width - len(row)) for row in rows], device=rollout.input_ids_BT.device
    )
    return Rollout(
        prompts=rollout.prompts,
        input_ids_BT=ids_BT,
        prompt_lengths=rollout.prompt_lengths,
        response_lengths=response_lengths,
        terminated=rollout.terminated,
        sampler_logprob_N=rollout.sampler_logprob_N,
        texts=rollout.texts,
        states=rollout.states,
    )
