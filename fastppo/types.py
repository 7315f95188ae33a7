"""The values that pass between the stages: prompts -> rollout -> scored -> experience -> metrics.

Shape suffixes: B sequences, T padded length, N live response tokens after packing, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One question to the policy, encoded with its generation header."""

    ids: list[int]
    text: str  # what the person asked, without template
    reference: str | None = (
        None  # the record's own answer: shown beside samples, never learned from
    )
    columns: dict[str, Any] = field(default_factory=dict)  # the record, for reward functions
    # The conversation, its system prompt first, for reward models that have a template of their own
    messages: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """One preference: the same prompt, a better and a worse answer, each ending in EOS."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class Sequences:
    """Prompts with their responses, in the layout of every forward pass: right padding."""

    input_ids_BT: Tensor  # int64
    prompt_lengths: list[int]
    response_lengths: list[int]  # EOS included; at least 1

    @property
    def lengths(self) -> list[int]:
        """Prompt plus response, in tokens."""
        return [p + r for p, r in zip(self.prompt_lengths, self.response_lengths, strict=True)]


@dataclass(frozen=True)
class Rollout(Sequences):
    """Sampled responses; those to one prompt stand side by side."""

    prompts: list[Prompt]
    terminated: list[bool]  # ended by itself, not by max_new_tokens
    sampler_logprob_N: Tensor  # float32, as the sampler computed them
    texts: list[str]  # decoded responses, without special tokens


@dataclass
class Kept:
    """The actor's hidden states of some rows with their gradient graph, kept for the update."""

    rows: list[int]
    hidden_BTD: Tensor | None

    def take(self, rows: list[int]) -> Tensor | None:
        """Return the kept hidden states if `rows` match, else None; either way release them."""
        hidden_BTD, self.hidden_BTD = self.hidden_BTD, None
        return hidden_BTD if rows == self.rows else None


@dataclass(frozen=True)
class Scored:
    """A rollout with what the frozen roles and the critic say of it; float32, without gradient.

    Sequence b owns the tokens offsets[b]:offsets[b + 1] of everything named _N.
    """

    rollout: Rollout
    offsets: Tensor  # int32 (B+1,)
    logprob_N: Tensor  # behaviour policy, recomputed with the training forward
    ref_logprob_N: Tensor
    entropy_N: Tensor
    score_B: Tensor  # as the reward gave it; of several, their weighted sum
    value_N: Tensor | None = None  # of the state before the token; None without a critic
    # Of the state after the last token: what a truncated response might go on to.
    final_value_B: Tensor | None = None
    exact_kl_N: Tensor | None = None  # over the whole vocabulary, for kl_penalty: full
    # Each reward's own score (B,) before its weight; NaN where it does not apply
    reward_parts: dict[str, Tensor] = field(default_factory=dict)
    kept: Kept | None = None  # with its gradient graph, where scoring and update can share it


@dataclass(frozen=True)
class Experience:
    """What the update learns from: packed tokens with their advantages."""

    scored: Scored
    score_B: Tensor  # after normalisation, clipping and penalties: what entered the reward
    advantage_N: Tensor
    return_N: Tensor
    reward_N: Tensor
    kl_N: Tensor  # by kl_penalty's estimate, whether or not the reward holds it
    kl_coef: float  # the beta that made reward_N, or that the loss uses
    importance_weight_N: Tensor | None = None  # sampler to behaviour policy, truncated


@dataclass(frozen=True)
class Answers:
    """What one policy said to the evaluation prompts, and what was thought of it."""

    texts: list[str]
    rewards: list[float]
    reward_parts: dict[str, Tensor]  # of several rewards each one's scores; NaN: does not apply
    judged: list[float] | None
    lengths: list[int]
    terminated: list[bool]
    kl: float  # to the reference, summed over a response, mean over responses
