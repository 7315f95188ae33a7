"""Dynamic sampling: prompts whose responses all score alike are left out, and others sampled.

Source: Yu et al. 2025, DAPO, section 3.2; `filter_groups` of verl.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.memory.retry import retry
from fastppo.ppo.rollout import next_prompts, sample, settings
from fastppo.ppo.score import Rewards, step_rewards
from fastppo.seeds import seed_of
from fastppo.types import Rollout, Sampled

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.ppo.metrics import Clock
    from fastppo.ppo.state import State

# A batch of responses and their scores.
ScoredRollout = tuple[Rollout, Rewards]


def refill(state: State, first: ScoredRollout, seed: int, clock: Clock) -> ScoredRollout:
    """The rollout that a step trains on: `first` filtered, and filled up from further prompts."""
    roles, budgets = state.roles, state.budgets

    def sample_batch(number: int) -> ScoredRollout:
        prompts = next_prompts(state, number)
        with clock("rollout"), roles.use("actor"):
            rollout = retry("rollout", budgets, used=lambda: len(prompts))(sample)(
                roles, prompts, seed=seed_of(seed, "refill", number), **settings(state)
            )
        with clock("score"):
            rollout = roles.with_states(rollout)
            return rollout, step_rewards(state, rollout, number * len(prompts))

    rollout, rewards = fill(first, sample_batch, state.config, state.template.pad_id)
    return roles.with_states(rollout), rewards


def groups_that_differ(score_B: Tensor, size: int) -> list[int]:
    """Rows of the groups of `size` responses to a prompt whose scores are not all the same."""
    score_GS = score_B.view(-1, size)
    differs_G = score_GS.amax(1) > score_GS.amin(1)
    rows: list[int] = differs_G.repeat_interleave(size).nonzero().flatten().tolist()
    return rows


def fill(
    first: ScoredRollout,
    sample_batch: Callable[[int], ScoredRollout],
    config: Config,
    pad_id: int,
) -> ScoredRollout:
    """A rollout of groups that differ, from `first` and the batches that are sampled after it.

    Batches are sampled until as many groups differ as a step has, at most `max_num_gen_batches` in
    all; then the step goes on with the groups that there are. If none differs, it has those of the
    last batch, and `Sampled.kept` is 0: there is nothing to learn from them.

    Args:
        sample_batch: samples and scores the batch of a number, from 1.
    """
    wanted, size = config.prompts_a_step, config.num_generations
    batch, batches, kept, scores = first, 1, [chosen(first, config)], [first[1][0]]
    tokens = sum(first[0].response_lengths)
    while groups_in(kept, size) < wanted and batches < config.max_num_gen_batches:
        batch = sample_batch(batches)
        batches += 1
        kept.append(chosen(batch, config))
        scores.append(batch[1][0])
        tokens += sum(batch[0].response_lengths)
    differing = groups_in(kept, size)
    whole = joined(kept, pad_id) if differing else batch
    rollout, rewards = rows_of(whole, range(min(differing or wanted, wanted) * size))
    score_B = torch.cat(scores)
    sampled = Sampled(
        batches=batches,
        responses=score_B.numel(),
        tokens=tokens,
        groups=score_B.numel() // size,
        differing=differing,
        kept=min(differing, wanted),
        score=score_B.mean().item(),
    )
    return replace(rollout, filtered_from=sampled), rewards


def chosen(scored: ScoredRollout, config: Config) -> ScoredRollout:
    """The rows of a batch that `filter_groups` keeps."""
    return rows_of(scored, groups_that_differ(scored[1][0], config.num_generations))


def groups_in(kept: Sequence[ScoredRollout], size: int) -> int:
    """Number of groups of `size` responses in all batches."""
    return sum(len(rollout.prompts) for rollout, _ in kept) // size


def rows_of(scored: ScoredRollout, rows: Sequence[int]) -> ScoredRollout:
    """These rows of a batch; hidden states of the whole batch are not kept."""
    rollout, (score_B, parts) = scored
    tokens = torch.split(rollout.sampler_logprob_N, rollout.response_lengths)
    index_B = torch.tensor(list(rows), dtype=torch.long, device=score_B.device)
    width = max((rollout.lengths[row] for row in rows), default=0)
    picked = Rollout(
        input_ids_BT=rollout.input_ids_BT[index_B, :width],
        prompt_lengths=[rollout.prompt_lengths[row] for row in rows],
        response_lengths=[rollout.response_lengths[row] for row in rows],
        prompts=[rollout.prompts[row] for row in rows],
        terminated=[rollout.terminated[row] for row in rows],
        sampler_logprob_N=torch.cat([rollout.sampler_logprob_N[:0], *(tokens[r] for r in rows)]),
        texts=[rollout.texts[row] for row in rows],
    )
    return picked, (score_B[index_B], {name: x[index_B] for name, x in parts.items()})


def joined(batches: Sequence[ScoredRollout], pad_id: int) -> ScoredRollout:
    """All rows of several batches in one."""
    rollouts = [rollout for rollout, _ in batches]
    width = max(rollout.input_ids_BT.shape[1] for rollout in rollouts)
    ids = [
        torch.nn.functional.pad(x.input_ids_BT, (0, width - x.input_ids_BT.shape[1]), value=pad_id)
        for x in rollouts
    ]
    whole = Rollout(
        input_ids_BT=torch.cat(ids),
        prompt_lengths=[n for x in rollouts for n in x.prompt_lengths],
        response_lengths=[n for x in rollouts for n in x.response_lengths],
        prompts=[prompt for x in rollouts for prompt in x.prompts],
        terminated=[ended for x in rollouts for ended in x.terminated],
        sampler_logprob_N=torch.cat([x.sampler_logprob_N for x in rollouts]),
        texts=[text for x in rollouts for text in x.texts],
    )
    scores = [score for _, score in batches]
    parts = {name: torch.cat([part[name] for _, part in scores]) for name in scores[0][1]}
    return whole, (torch.cat([score_B for score_B, _ in scores]), parts)
