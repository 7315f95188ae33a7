"""The values that pass between the stages: prompts -> rollout -> scored -> experience -> metrics.

Shape suffixes: B sequences, T padded length, N live response tokens after packing, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from fastppo.models.shared_states import SharedStates


@dataclass(frozen=True)
class Prompt:
    """One prompt, encoded with its generation header."""

    ids: list[int]
    text: str  # the user's question, without template
    reference: str | None = None  # the record's own answer: shown with samples, not trained on
    columns: dict[str, Any] = field(default_factory=dict)  # the record, for reward functions
    # The conversation, system prompt first, for reward models with their own chat template
    messages: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """A preference pair: a prompt, and a better and a worse answer to it, each with EOS."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class Sequences:
    """Rows of prompt and response, padded on the right, as forward passes need them."""

    input_ids_BT: Tensor  # int64
    prompt_lengths: list[int]
    response_lengths: list[int]  # EOS included; at least 1
    # Hidden states behind the layers that roles share; None if every pass runs whole
    states: SharedStates | None = field(default=None, kw_only=True)

    @property
    def lengths(self) -> list[int]:
        """The length of each row, prompt plus response, in tokens."""
        return [p + r for p, r in zip(self.prompt_lengths, self.response_lengths, strict=True)]

    @property
    def prompt_numbers(self) -> list[int] | None:
        """A number for each row, the same for rows with the same prompt; None if nobody knows."""
        return None


@dataclass(frozen=True)
class Sampled:
    """What a step with `filter_groups` sampled, of which its rollout is a part."""

    batches: int
    responses: int
    tokens: int
    groups: int  # prompts
    differing: int  # of them, those whose responses did not all score alike
    kept: int  # of those, as many as a step trains on
    score: float  # mean of all responses

    def columns(self) -> dict[str, float]:
        """What training_metrics.csv says of them."""
        return {
            "refills": self.batches - 1,
            "groups_alike": self.groups - self.differing,
            "groups_trained": self.kept,
            "sampled_responses": self.responses,
            "sampled_tokens": self.tokens,
            "score_sampled": self.score,
        }


@dataclass(frozen=True)
class Rollout(Sequences):
    """Sampled responses; the responses to the same prompt are in consecutive rows."""

    prompts: list[Prompt]
    terminated: list[bool]  # whether the response ended by itself, not by max_new_tokens
    sampler_logprob_N: Tensor  # float32, log-probs as the sampler computed them
    texts: list[str]  # decoded responses, without special tokens
    filtered_from: Sampled | None = None  # None without filter_groups

    @cached_property
    def prompt_numbers(self) -> list[int]:
        """A number for each row, the same for neighbours with the same prompt."""
        numbers: list[int] = []
        for row, prompt in enumerate(self.prompts):
            same = row > 0 and self.prompts[row - 1].ids == prompt.ids
            numbers.append(numbers[-1] if same else row)
        return numbers


@dataclass
class Kept:
    """Hidden states (B, T, D) with their autograd graph, by role and rows of their micro-batch.

    Scoring keeps them for the first optimiser step, which has the same weights.
    """

    hidden: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def retain(self, micro_batches: Iterable[list[int]]) -> None:
        """Release what is of none of these micro-batches, given by their rows."""
        wanted = {tuple(rows) for rows in micro_batches}
        self.hidden = {key: x for key, x in self.hidden.items() if key[1] in wanted}

    def take(self, role: str, rows: list[int]) -> Tensor | None:
        """Return what is kept of a role's micro-batch with these rows, and release it."""
        return self.hidden.pop((role, tuple(rows)), None)

    def among(self, first: int) -> Kept:
        """The same, of rows `first` and following of a larger rollout."""
        return Kept(
            {
                (role, tuple(first + row for row in rows)): x
                for (role, rows), x in self.hidden.items()
            }
        )


@dataclass(frozen=True)
class Scored:
    """A rollout with its scores, log-probs and values; float32, without gradient.

    In a tensor named _N the tokens of sequence b are offsets[b]:offsets[b + 1].
    """

    rollout: Rollout
    offsets: Tensor  # int32 (B+1,)
    logprob_N: Tensor  # of the behaviour policy, recomputed with the training forward
    ref_logprob_N: Tensor
    entropy_N: Tensor
    score_B: Tensor  # the reward's score; with several rewards, their weighted sum
    value_N: Tensor | None = None  # value of the state before the token; None without a critic
    # Value of the state after the last token, for truncated responses.
    final_value_B: Tensor | None = None
    exact_kl_N: Tensor | None = None  # KL over the whole vocabulary, for kl_penalty: full
    # Each reward's scores (B,), not yet weighted; NaN if it does not apply
    reward_parts: dict[str, Tensor] = field(default_factory=dict)
    kept: Kept | None = None  # forwards that the update can use
    # The rows that this process scored, and runs in the update; None: all, in a run of one process
    own: range | None = None


@dataclass(frozen=True)
class Experience:
    """What the update trains on: the rollout's response tokens with their advantages."""

    scored: Scored
    score_B: Tensor  # after normalisation, clipping and penalties; part of the reward
    advantage_N: Tensor
    return_N: Tensor
    reward_N: Tensor
    kl_N: Tensor  # the estimate that kl_penalty names, even if it is not part of the reward
    kl_coef: float  # the beta of reward_N, or of the loss
    importance_weight_N: Tensor | None = None  # behaviour policy / sampler, truncated
    left_out: frozenset[int] = frozenset()  # rows that no loss is computed on


@dataclass(frozen=True)
class Answers:
    """One policy's responses to the evaluation prompts, and their scores."""

    texts: list[str]
    rewards: list[float]
    reward_parts: dict[str, Tensor]  # with several rewards, the scores of each; NaN: not applicable
    judged: list[float] | None
    lengths: list[int]
    terminated: list[bool]
    kl: float  # KL to the reference, summed over a response, mean over responses
