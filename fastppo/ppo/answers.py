"""Responses to the prompts of an evaluation, with their rewards, the judge's scores and the KL."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.errors import UserError
from fastppo.memory.retry import retry
from fastppo.models.batch import largest_micro_batch
from fastppo.ppo.rollout import sample, settings
from fastppo.ppo.score import rewards_of, score
from fastppo.rewards.function import call_scores, load_function
from fastppo.seeds import seed_of
from fastppo.types import Answers

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.models.build import Role
    from fastppo.ppo.state import State
    from fastppo.types import Prompt, Rollout


def answer(state: State, role: Role, prompts: list[Prompt]) -> Answers:
    """Sample responses of `role` to `prompts`; score them, and with `eval_judge` judge them.

    Of several processes each answers its part of the prompts, and every one gets all answers. The
    judge is asked in the first alone, for all of them.
    """
    world, size = state.world, state.config.per_device_eval_batch_size
    part, sharding = world.part(len(prompts)), state.roles.sharding
    starts = range(part.start, part.stop, size)
    missing = 0 if sharding is None else sharding.missing(len(starts))
    # Sharded, a group needs the others while it runs: then it is its reward that may fail.
    with world.together() if sharding is None else nullcontext():
        groups = [
            answer_group(state, role, prompts[start : min(start + size, part.stop)], start)
            for start in starts
        ]
    for _ in range(missing):
        join_group(state, role)
    groups = [group for theirs in world.gather(groups) for group in theirs]
    texts = [text for group in groups for text in group.texts]
    parts = {
        name: torch.cat([group.reward_parts[name] for group in groups])
        for name in state.reward.extra_names
    }
    return Answers(
        texts=texts,
        rewards=[reward for group in groups for reward in group.rewards],
        reward_parts=parts,
        judged=world.on_main(judge, state.config, prompts, texts),
        lengths=[length for group in groups for length in group.lengths],
        terminated=[ended for group in groups for ended in group.terminated],
        kl=sum(group.kl for group in groups) / len(prompts),
    )


def answer_group(state: State, role: Role, group: list[Prompt], first: int) -> Answers:
    """The answers to prompts `first` and following; their KL is a sum, and nobody judges them."""
    roles, budgets = state.roles, state.budgets
    with roles.use(role):
        rollout = retry("rollout", budgets, used=partial(len, group))(sample)(
            roles,
            group,
            seed=seed_of(state.config.seed, "evaluation"),
            first_row=first,
            **settings(state),
        )
    rollout = roles.with_states(rollout)
    with nullcontext() if roles.sharding is None else state.world.together():
        score_B, parts = rewards_of(state, rollout, "evaluation", first)
    kl = 0.0 if role == "reference" else total_kl(state, rollout, (score_B, parts))
    if state.world.size > 1:  # the others cannot reach this process's GPU
        parts = {name: part_B.cpu() for name, part_B in parts.items()}
    return Answers(
        texts=rollout.texts,
        rewards=score_B.tolist(),
        reward_parts=parts,
        judged=None,
        lengths=rollout.response_lengths,
        terminated=rollout.terminated,
        kl=kl,
    )


def join_group(state: State, role: Role) -> None:
    """Take part in the passes of a group of other processes, for one that has no such group."""
    sharding = state.roles.sharding
    assert sharding is not None
    state.roles.eval()
    with torch.no_grad():
        with state.roles.use(role):
            sharding.join_passes()
        with state.world.together():
            state.reward.join_passes(sharding)
        if role != "reference":
            sharding.idle_scoring(sharding.missing(0))


def judge(config: Config, prompts: list[Prompt], texts: list[str]) -> list[float] | None:
    """The scores of `eval_judge`, if there is one."""
    if config.eval_judge is None:
        return None
    function = load_function(config.eval_judge, "eval_judge")
    scores = call_scores(function, "eval_judge", [p.text for p in prompts], texts)
    judged = [score for score in scores if score is not None]
    if len(judged) < len(scores):
        raise UserError("eval_judge: gave None for a completion; a judge scores every one")
    return judged


def total_kl(state: State, rollout: Rollout, rewards: tuple[Tensor, dict[str, Tensor]]) -> float:
    """The KL to the reference, summed over all tokens of a rollout."""
    budgets = state.budgets
    used = partial(largest_micro_batch, rollout, budgets.scoring)
    scored = retry("score", budgets, used=used)(score)(
        state.roles,
        rollout,
        rewards,
        temperature=state.config.temperature,
        budget=budgets.scoring,
        chunk_bytes=budgets.chunk_bytes,
    )
    return (scored.logprob_N - scored.ref_logprob_N).sum().item()
