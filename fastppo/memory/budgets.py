"""How much a phase takes on at a time: the one thing about a step that memory may change.

What is learned depends on them by rounding alone, and what is sampled on `generation_batch`.
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
    """How large a micro-batch may be; a row that is larger by itself runs alone.

    Attributes:
        tokens: most tokens, padding included; None is no limit.
        rows: most sequences; None is no limit.
        packed: rows stand behind one another in one, without padding.
    """

    tokens: int | None = None
    rows: int | None = None
    packed: bool = False

    @classmethod
    def of(cls, config: Config, *, scoring: bool = False) -> Budget:
        """That of the update, or of scoring, which keeps nothing for a backward."""
        tokens = config.ppo_max_token_len_per_gpu or micro_batch_tokens(config)
        if scoring:
            tokens = config.log_prob_max_token_len_per_gpu or tokens
        return cls(count(tokens), config.ppo_micro_batch_size_per_gpu, config.padding_free)

    def allows(self, rows: int, tokens: int) -> bool:
        """Whether a micro-batch may be so large."""
        return (self.rows is None or rows <= self.rows) and (
            self.tokens is None or tokens <= self.tokens
        )

    @property
    def padded(self) -> Budget:
        """The same for micro-batches that are not packed."""
        return Budget(self.tokens, self.rows)


@dataclass
class Budgets:
    """One for a run, which its stages share; running out of memory halves what is in it.

    Attributes:
        update: of a micro-batch of the update.
        scoring: the same, in training and in evaluation.
        generation_batch: sequences that are sampled at a time; None is all of them.
        chunk_bytes: of logits that exist at a time; None is the operators' own default.
        activation_offloading: none, checkpoint, offload or checkpoint+offload.
    """

    update: Budget
    scoring: Budget
    generation_batch: int | None = None
    chunk_bytes: int | None = None
    activation_offloading: str = "checkpoint"

    @classmethod
    def of(cls, config: Config) -> Budgets:
        """What the file says, once each `auto` is resolved."""
        return cls(
            update=Budget.of(config),
            scoring=Budget.of(config, scoring=True),
            generation_batch=count(config.generation_batch),
            chunk_bytes=count(config.chunk_bytes),
            activation_offloading=offload_mode(config),
        )

    def decisions(self) -> dict[str, Any]:
        """Key -> value of all, which a checkpoint stores: a run that goes on decides the same."""
        return {
            "ppo_max_token_len_per_gpu": self.update.tokens,
            "log_prob_max_token_len_per_gpu": self.scoring.tokens,
            "generation_batch": self.generation_batch,
            "chunk_bytes": self.chunk_bytes,
            "activation_offloading": self.activation_offloading,
        }

    def adopt(self, decisions: dict[str, Any]) -> None:
        """Decide as a checkpoint did; those that hold a part of this see it."""
        self.update.tokens = decisions["ppo_max_token_len_per_gpu"]
        self.scoring.tokens = decisions["log_prob_max_token_len_per_gpu"]
        for name in ("generation_batch", "chunk_bytes", "activation_offloading"):
            setattr(self, name, decisions[name])

    def halve(self, phase: Phase, used: int) -> str | None:
        """Half of what a phase took on at most, which may be less than its budget.

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


def count(value: int | str | None) -> int | None:
    """A count; `auto` would be one that the plan was not asked about."""
    assert not isinstance(value, str), f"{value} is not resolved"
    return value
