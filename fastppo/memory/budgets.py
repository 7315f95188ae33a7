"""Limits on how much a phase of a step processes at a time; they are halved if memory runs out.

They change training only by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastppo.config.memory import micro_batch_tokens, offload_mode

if TYPE_CHECKING:
    from fastppo.config import Config

Phase = Literal["rollout", "score", "update"]


@dataclass(frozen=True)
class PromptSharing:
    """When a prompt that several responses of a micro-batch share is run once.

    Attributes:
        hidden: width of the model's hidden states.
        longest: tokens of the longest sequence of which all layers see all; None is any length.
    """

    hidden: int
    longest: int | None = None

    def products(self, rows: int, length: int, *, masked: bool) -> int:
        """Products in a layer's forward: 12 D^2 a token, and in attention 2 D a pair of tokens.

        Without a mask half of the pairs are left out; with one none are.
        """
        return rows * length * self.hidden * (12 * self.hidden + (1 + masked) * length)

    def pays(self, whole: tuple[int, int], once: tuple[int, int]) -> bool:
        """Whether rows and tokens with each prompt once are at least a tenth less to compute."""
        if self.longest is not None and whole[1] > self.longest:
            return False
        return 10 * self.products(*once, masked=True) <= 9 * self.products(*whole, masked=False)


def may_share_prompts(config: Config) -> bool:
    """Whether a micro-batch may have responses to one prompt; 8-bit products differ by batch."""
    return config.num_generations > 1 and not config.padding_free and config.quantization_bit != 8


@dataclass
class Budget:
    """Limits on the size of a micro-batch; a sequence that exceeds them runs alone.

    Attributes:
        tokens: largest number of tokens, including padding; None is no limit.
        rows: largest number of sequences; None is no limit.
        packed: whether sequences are concatenated into one row, without padding.
        prompts: when prompts that responses share are run once; None is never. The limits are of
            the rows as they are without that.
    """

    tokens: int | None = None
    rows: int | None = None
    packed: bool = False
    prompts: PromptSharing | None = None

    @classmethod
    def of(cls, config: Config, *, scoring: bool = False) -> Budget:
        """The budget of the update, or with `scoring` that of scoring, which has no backward."""
        tokens = config.ppo_max_token_len_per_gpu or micro_batch_tokens(config)
        if scoring:
            tokens = config.log_prob_max_token_len_per_gpu or tokens
        return cls(as_count(tokens), config.ppo_micro_batch_size_per_gpu, config.padding_free)

    @property
    def padded(self) -> Budget:
        """The same budget for padded micro-batches."""
        return Budget(self.tokens, self.rows)


@dataclass
class Budgets:
    """The budgets of a run, shared by its phases; they are halved if memory runs out.

    Attributes:
        update: limits of a micro-batch of the update.
        scoring: limits of a micro-batch of scoring, in training and in evaluation.
        generation_batch: number of sequences that are sampled at a time; None is all of them.
        chunk_bytes: bytes of logits that exist at a time; None is the operators' default.
        activation_offloading: none, checkpoint, offload or checkpoint+offload.
        retries: whether a phase that ran out of memory is tried again with half of its budget.
    """

    update: Budget
    scoring: Budget
    generation_batch: int | None = None
    chunk_bytes: int | None = None
    activation_offloading: str = "checkpoint"
    retries: bool = True

    @classmethod
    def of(cls, config: Config) -> Budgets:
        """The budgets that the configuration sets; each `auto` must have been resolved."""
        return cls(
            update=Budget.of(config),
            scoring=Budget.of(config, scoring=True),
            generation_batch=as_count(config.generation_batch),
            chunk_bytes=as_count(config.chunk_bytes),
            activation_offloading=offload_mode(config),
        )

    def decisions(self) -> dict[str, Any]:
        """The budgets as key -> value; a checkpoint stores them for the run that resumes it."""
        return {
            "ppo_max_token_len_per_gpu": self.update.tokens,
            "log_prob_max_token_len_per_gpu": self.scoring.tokens,
            "generation_batch": self.generation_batch,
            "chunk_bytes": self.chunk_bytes,
            "activation_offloading": self.activation_offloading,
        }

    def adopt(self, decisions: dict[str, Any]) -> None:
        """Set the budgets to a checkpoint's values, in place, so that all their users see them."""
        self.update.tokens = decisions["ppo_max_token_len_per_gpu"]
        self.scoring.tokens = decisions["log_prob_max_token_len_per_gpu"]
        for name in ("generation_batch", "chunk_bytes", "activation_offloading"):
            setattr(self, name, decisions[name])

    def halve(self, phase: Phase, used: int) -> str | None:
        """Halve a phase's budget.

        Args:
            phase: rollout, score or update.
            used: the largest number that the phase processed at a time (of sequences in rollout,
                else of tokens in a micro-batch), which may be below its budget. The new budget is
                half of it.

        Returns:
            The YAML's key and its new value, as text; None if the budget is 1 already.
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
    """The value of a key that may be `auto`, which the plan must have resolved."""
    assert not isinstance(value, str), f"{value} is not resolved"
    return value
