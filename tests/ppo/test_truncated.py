"""Truncated responses: the penalty before max_new_tokens, and leaving them out of the loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastppo.models.batch import mini_batches
from fastppo.ppo.advantage import KLController, RunningScore, estimate, overlong_penalty
from fastppo.ppo.optimizer import make_optimizer
from fastppo.ppo.update import update
from fastppo.types import Experience

# Responses of 1, 3, 5 and 2 tokens; the one of 3 is cut off.
CUT = 1
MASKED = {"mask_truncated_completions": True}


def trained(made) -> torch.Tensor:
    parts = [*made.trainable_parameters("actor"), *made.trainable_parameters("critic")]
    parts += list(made.critic_head.parameters()) if made.critic_head is not None else []
    return torch.cat([p.detach().flatten().clone() for p in parts])


def with_score(experience: Experience, row: int, score: float, settings) -> Experience:
    """The experience of the same rollout whose response in `row` has another score."""
    scored = experience.scored
    score_B = scored.score_B.clone()
    score_B[row] = score
    changed = replace(scored, score_B=score_B, kept=None)
    return estimate(changed, settings, KLController(0.1, 6.0, 10000), RunningScore())


def test_the_penalty_grows_over_the_buffer_from_none_to_the_factor():
    # Ten tokens at most, the last four are the buffer: 6 costs nothing, 8 half, 10 everything.
    length_B = torch.tensor([1, 6, 7, 8, 10])
    found = overlong_penalty(length_B, max_new_tokens=10, buffer_len=4, factor=2.0)
    assert found.tolist() == [0.0, 0.0, 0.5, 1.0, 2.0]


def test_a_longer_response_of_the_same_score_never_earns_more(
    tiny_roles, config, rollout, experience_of
):
    settings = config(max_new_tokens=5, overlong_buffer_len=4, overlong_penalty_factor=0.5)
    experience = experience_of(tiny_roles(), rollout, settings)
    alike = replace(experience.scored, score_B=torch.ones(4), kept=None)
    score_B = estimate(alike, settings, KLController(0.1, 6.0, 10000), RunningScore()).score_B
    by_length = [score_B[row].item() for row in (0, 3, 1, 2)]  # 1, 2, 3 and 5 tokens
    assert by_length == sorted(by_length, reverse=True)
    assert (by_length[0], by_length[-1]) == (1.0, 0.5)


@pytest.mark.parametrize(
    "more",
    [{}, pytest.param({"advantage": "reinforce++"}, marks=pytest.mark.slow)],
    ids=["gae", "reinforce++"],
)
def test_what_a_masked_response_earned_changes_no_weight(
    tiny_roles, config, rollout, experience_of, more
):
    """Neither by its own tokens, nor by shifting the mean that whitening subtracts from others."""
    settings = config(**MASKED, **more, ppo_epochs=2)
    after = []
    for score in (0.0, 50.0):
        made = tiny_roles(**more)
        experience = with_score(experience_of(made, rollout, settings), CUT, score, settings)
        update(made, experience, settings, make_optimizer(settings, made), seed=0)
        after.append(trained(made))
    assert torch.equal(*after)
    unmasked = config(**more, ppo_epochs=2)
    made = tiny_roles(**more)
    experience = with_score(experience_of(made, rollout, unmasked), CUT, 50.0, unmasked)
    update(made, experience, unmasked, make_optimizer(unmasked, made), seed=0)
    assert not torch.equal(trained(made), after[0])


def test_a_masked_response_is_still_compared_with_its_group(
    tiny_roles, config, rollout, experience_of
):
    """TRL computes a group's mean and deviation before it masks: so the other row learns of it."""
    grpo = {"advantage": "grpo", "num_generations": 2}
    settings = config(**MASKED, **grpo)
    experience = experience_of(tiny_roles(**grpo), rollout, settings)
    worse, better = (with_score(experience, CUT, score, settings) for score in (-9.0, 9.0))
    assert worse.advantage_N[0] > 0 > better.advantage_N[0]  # row 0 shares a prompt with row 1


def test_a_step_of_masked_responses_alone_changes_nothing(
    tiny_roles, config, rollout, experience_of
):
    """Not even by the optimiser's momentum or weight decay; every metric is a finite number."""
    settings = config(**MASKED, weight_decay=0.1, use_kl_loss=True)
    made = tiny_roles()
    optimizer = make_optimizer(settings, made)
    update(made, experience_of(made, rollout, settings), settings, optimizer, seed=0)
    before = trained(made)
    cut_off = replace(rollout, terminated=[False] * 4)
    learned = update(made, experience_of(made, cut_off, settings), settings, optimizer, seed=1)
    assert torch.equal(trained(made), before)
    whole = update(made, experience_of(made, rollout, settings), settings, optimizer, seed=1)
    assert learned.keys() >= whole.keys() - {"grad_norm_actor", "grad_norm_critic"}
    assert all(math.isfinite(value) for value in learned.values())
    assert (learned["optimizer_steps"], learned["ratio_mean"], learned["update_tokens"]) == (
        0,
        1,
        0,
    )


@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        ("token-mean", {0: 1 / 8, 2: 1 / 8, 3: 1 / 8}),  # of the 8 tokens that train
        ("seq-mean-token-mean", {0: 1 / 4, 2: 1 / 20, 3: 1 / 8}),  # 4 responses, one of them 0
        ("seq-mean-token-sum", {0: 1 / 4, 2: 1 / 4, 3: 1 / 4}),
    ],
)
def test_a_masked_response_counts_among_responses_and_not_among_tokens(
    tiny_roles, config, rollout, experience_of, mode, weights
):
    settings = config(**MASKED, loss_agg_mode=mode)
    experience = experience_of(tiny_roles(), rollout, settings)
    (mini,) = mini_batches(experience, settings, seed=0)
    assert mini.weights == weights
    assert mini.tokens == 8
