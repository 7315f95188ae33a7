"""Sampling and scoring with a run's own settings, tried again with half where memory runs out."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fastppo.memory.retry import retried
from fastppo.models.batch import largest_micro_batch
from fastppo.ppo.rollout import sample
from fastppo.ppo.sampling import Sampling
from fastppo.ppo.score import score

if TYPE_CHECKING:
    from fastppo.ppo.state import State
    from fastppo.types import Prompt, Rollout, Scored


def sampled(state: State, prompts: list[Prompt], *, seed: int) -> Rollout:
    """Responses of the active role."""

    def run() -> Rollout:
        return sample(
            state.roles,
            prompts,
            sampling=Sampling.of(state.config),
            template=state.template,
            tokenizer=state.tokenizer,
            seed=seed,
            most=state.budgets.generation_batch,
            plan=state.plan,
        )

    return retried("rollout", state.budgets, run, used=lambda: len(prompts))


def scored(state: State, rollout: Rollout, *, exact_kl: bool = False, keep: bool = False) -> Scored:
    """What all roles say of a rollout, in micro-batches of the scoring budget.

    The rewards are asked once: where memory runs out, only the forwards are run again.
    """
    budgets = state.budgets
    state.roles.eval()
    answer = state.reward(rollout)

    def run() -> Scored:
        return score(
            state.roles,
            rollout,
            lambda _: answer,
            temperature=state.config.temperature,
            budget=budgets.scoring,
            exact_kl=exact_kl,
            keep=keep,
            chunk_bytes=budgets.chunk_bytes,
        )

    return retried(
        "score", budgets, run, used=partial(largest_micro_batch, rollout, budgets.scoring)
    )
