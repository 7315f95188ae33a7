"""Limits on how much a phase of a step works on at a time, which running out of memory halves.

What is learned depends on them by rounding alone; what is sampled depends on `generation_batch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastppo.config.memory import micro_batch_tokens, offload_mode

if TYPE_CHECKING:
    from fastppo.config import Config

Phase = Literal["rollout", "score", "update"]


@dataclass
class Budget:
    """How large a micro-batch may be; a sequence that is over the limit runs alone.

    Attributes:
        tokens: most tokens, padding included; None is no limit.
        rows: most sequences; None is no limit.
        packed: sequences are concatenated into one row, without padding.
    """

    tokens: int | None = None
    rows: int | None = None
    packed: bool = False

    @classmethod
    def of(cls, config: Config, *, scoring: bool = False) -> Budget:
        """The update's budget, or the one of scoring, which saves nothing for a backward."""
        tokens = config.ppo_max_token_len_per_gpu or micro_batch_tokens(config)
        if scoring:
            tokens = config.log_prob_max_token_len_per_gpu or tokens
        return cls(as_count(tokens), config.ppo_micro_batch_size_per_gpu, config.padding_free)

    def allows(self, rows: int, tokens: int) -> bool:
        """Whether a micro-batch of so many sequences and tokens is within the budget."""
        return (self.rows is None or rows <= self.rows) and (
            self.tokens is None or tokens <= self.tokens
        )

    @property
    def padded(self) -> Budget:
        """The same budget for micro-batches that are padded, not packed."""
        return Budget(self.tokens, self.rows)


@dataclass
class Budgets:
    """The budgets of a run, shared by its phases; running out of memory halves them.

    Attributes:
        update: limits of a micro-batch of the update.
        scoring: limits of a micro-batch of scoring, in training and in evaluation.
        generation_batch: sequences that are sampled at a time; None is all of them.
        chunk_bytes: bytes of logits that exist at a time; None is the operators' own default.
        activation_offloading: none, checkpoint, offload or checkpoint+offload.
    """

    update: Budget
    scoring: Budget
    generation_batch: int | None = None
    chunk_bytes: int | None = None
    activation_offloading: str = "checkpoint"

    @classmethod
    def of(cls, config: Config) -> Budgets:
        """The budgets that the configuration sets, once each `auto` is resolved."""
        return cls(
            update=Budget.of(config),
            scoring=Budget.of(config, scoring=True),
            generation_batch=as_count(config.generation_batch),
            chunk_bytes=as_count(config.chunk_bytes),
            activation_offloading=offload_mode(config),
        )

    def decisions(self) -> dict[str, Any]:
        """Key -> value, as a checkpoint stores them: a resumed run uses the same."""
        return {
            "ppo_max_token_len_per_gpu": self.update.tokens,
            "log_prob_max_token_len_per_gpu": self.scoring.tokens,
            "generation_batch": self.generation_batch,
            "chunk_bytes": self.chunk_bytes,
            "activation_offloading": self.activation_offloading,
        }

    def adopt(self, decisions: dict[str, Any]) -> None:
        """Take over a checkpoint's values, in place: whoever holds a Budget of these sees them."""
        self.update.tokens = decisions["ppo_max_token_len_per_gpu"]
        self.scoring.tokens = decisions["log_prob_max_token_len_per_gpu"]
        for name in ("generation_batch", "chunk_bytes", "activation_offloading"):
            setattr(self, name, decisions[name])

    def halve(self, phase: Phase, used: int) -> str | None:
        """Halve a phase's budget.

        Args:
            phase: rollout, score or update.
            used: the most that the phase worked on at a time, which may be below its budget;
                sequences in rollout, else tokens of a micro-batch. Half of it is the new budget.

        Returns:
            The key of the YAML and its new value; None where it is 1 already.
        """
        if phase == "rollout":
            now = min(self.generation_batch or used, used)
            self.generation_batch = max(1, now // 2)
            return f"generation_batch: {now // 2}" if now > 1 else None
        budget = self.update if phase == "update" else self.scoring
        now = min(budget.tokens or used, used)
        budget.tokens = max(1, now // 2)
        key = "ppo_max" if phase == "update" else "log_prob_max"
        return f"{key}_token_len_per_gpu: {now // 2}" if now > 1 else None


def as_count(value: int | str | None) -> int | None:
    """The value of a key that may be `auto`, once the plan has resolved it."""
    assert not isinstance(value, str), f"{value} is not resolved"
    return value
