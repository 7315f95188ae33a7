"""Scores to rewards: KL controller, running normalisation, penalties, bootstrap; in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastppo.ppo.advantage import KLController, RunningScore, estimate, shape_score
from fastppo.types import Scored


@pytest.fixture
def scored(rollout) -> Scored:
    generator = torch.Generator().manual_seed(0)
    lengths = rollout.response_lengths
    n = sum(lengths)

    def random(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return Scored(
        rollout=rollout,
        offsets=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        logprob_N=random(n) - 3,
        ref_logprob_N=random(n) - 3,
        entropy_N=random(n).abs(),
        value_N=random(n),
        final_value_B=torch.tensor([7.0, 11.0, 13.0, 17.0], dtype=torch.float64),
        score_B=random(len(lengths)),
    )


def controller(beta: float = 0.1) -> KLController:
    return KLController(beta, target=6.0, horizon=10000)


def per_sequence(x_N: torch.Tensor, scored: Scored) -> torch.Tensor:
    return torch.stack([part.sum() for part in x_N.split(scored.rollout.response_lengths)])


def test_14_score_is_added_once_at_the_last_token(scored, config):
    experience = estimate(scored, config(whiten_advantages=False), controller(), RunningScore())
    total = per_sequence(experience.reward_N + 0.1 * experience.kl_N, scored)
    torch.testing.assert_close(total, scored.score_B, atol=1e-6, rtol=0)
    last = scored.offsets[1:].long() - 1
    inner = torch.ones_like(experience.reward_N, dtype=torch.bool)
    inner[last] = False
    torch.testing.assert_close(experience.reward_N[inner], (-0.1 * experience.kl_N)[inner])


def test_15_a_response_without_eos_pays_and_one_with_eos_does_not(scored, config):
    shaped = shape_score(scored, config(missing_eos_penalty=1.5), RunningScore())
    assert (scored.score_B - shaped).tolist() == [0.0, 1.5, 0.0, 0.0]


def test_16_truncated_may_be_bootstrapped_and_terminated_never(scored, config):
    plain = config(whiten_advantages=False, gamma=0.9, lam=0.0)
    cut = estimate(scored, plain, controller(), RunningScore())
    go_on = plain.model_copy(update={"bootstrap_truncated": True})
    on = estimate(scored, go_on, controller(), RunningScore())
    last = scored.offsets[1:].long() - 1
    difference = (on.advantage_N - cut.advantage_N)[last]
    # Only row 1 was cut off; gamma * V(state after it) takes the place of its score.
    expected = torch.zeros_like(difference)
    expected[1] = 0.9 * 11.0 - scored.score_B[1]
    torch.testing.assert_close(difference, expected)


@pytest.fixture
def finished_and_cut(lay_out, template) -> Scored:
    """Two responses of four tokens, the second cut off, both of score 1, on the reference."""
    words = [70, 71, 72]
    rollout = lay_out(["Hi", "What?"], [[*words, template.eos_id], [*words, 73]])
    logprob_N = torch.full((8,), -3.0, dtype=torch.float64)
    return Scored(
        rollout=rollout,
        offsets=torch.tensor([0, 4, 8], dtype=torch.int32),
        logprob_N=logprob_N,
        ref_logprob_N=logprob_N,
        entropy_N=logprob_N.abs(),
        value_N=torch.ones(8, dtype=torch.float64),
        final_value_B=torch.ones(2, dtype=torch.float64),
        score_B=torch.ones(2, dtype=torch.float64),
    )


@pytest.mark.parametrize("bootstrap", [False, True])
def test_16_a_right_critic_leaves_no_advantage_to_a_truncated_response(
    finished_and_cut, config, bootstrap
):
    settings = config(whiten_advantages=False, bootstrap_truncated=bootstrap)
    got = estimate(finished_and_cut, settings, controller(), RunningScore())
    assert got.advantage_N.abs().max() < 1e-6, "all scores are 1, and the critic says so"


@pytest.mark.parametrize("after", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("more", [{}, {"missing_eos_penalty": 0.5}, {"score_clip": 0.9}], ids=str)
def test_16_a_truncated_response_earns_no_more_than_a_finished_one(
    finished_and_cut, config, after, more
):
    """Where its critic expects no more of it than finished ones get."""
    scored = replace(finished_and_cut, final_value_B=torch.full((2,), after).double())
    settings = config(lam=1.0, whiten_advantages=False, bootstrap_truncated=True, **more)
    got = estimate(scored, settings, controller(), RunningScore())
    finished, cut = got.return_N.split(4)
    limit = after - more.get("missing_eos_penalty", 0.0)
    assert (cut <= torch.clamp(finished, min=limit) + 1e-6).all()
    torch.testing.assert_close(cut, torch.full_like(cut, limit))


def test_17_rewards_carry_no_gradient_and_the_logged_beta(scored, config):
    live = replace(scored, logprob_N=scored.logprob_N.clone().requires_grad_())
    held = controller(0.3)
    experience = estimate(live, config(), held, RunningScore())
    assert not experience.reward_N.requires_grad
    assert not experience.advantage_N.requires_grad
    held.update(kl=100.0, n=8)
    assert experience.kl_coef == 0.3
    assert held.kl_coef > 0.3


def test_18_controller_follows_zieglers_formula():
    held = KLController(0.2, target=6.0, horizon=10000)
    expected = 0.2
    for kl in (0.0, 3.0, 6.0, 6.6, 100.0):
        held.update(kl, n=8)
        expected *= 1 + max(-0.2, min(0.2, kl / 6.0 - 1)) * 8 / 10000
        assert held.kl_coef == pytest.approx(expected, abs=1e-15)
    fixed = KLController(0.2, 6.0, 10000, adaptive=False)
    fixed.update(100.0, 8)
    assert fixed.kl_coef == 0.2


@pytest.mark.parametrize("n", [1, 8, 59, 60, 61, 64, 300, 301, 512, 10**6, 10**12])
@pytest.mark.parametrize("horizon", [1e-3, 10, 60, 10000])
def test_18_beta_stays_positive_and_goes_to_its_target_for_any_horizon(n, horizon):
    """A KL above the target raises beta, one below lowers it, by a fifth of it at most."""
    betas = []
    for kl in (-50.0, 0.0, 3.0, 6.0, 6.3, 12.0, 1e9):
        held = KLController(0.2, target=6.0, horizon=horizon)
        held.update(kl, n)
        betas.append(held.kl_coef)
        assert held.kl_coef > 0
        assert (held.kl_coef > 0.2, held.kl_coef < 0.2) == (kl > 6.0, kl < 6.0)
        assert 0.8 <= held.kl_coef / 0.2 <= 1.2000001
    assert betas == sorted(betas), "the more KL, the more beta"
    held = KLController(0.2, target=6.0, horizon=horizon)
    for _ in range(300):
        held.update(0.0, n)
    assert 0 < held.kl_coef < 0.2


def test_18_more_responses_never_move_beta_less():
    def moved(n: int) -> float:
        held = KLController(0.2, target=6.0, horizon=60)
        held.update(0.0, n)
        return 0.2 - held.kl_coef

    steps = [moved(n) for n in (1, 16, 60, 64, 512, 10**9)]
    assert steps == sorted(steps)


def test_20_running_score_counts_the_batch_in_and_survives_one_sample():
    running = RunningScore()
    assert running.normalise(torch.tensor([5.0])).tolist() == [0.0]
    assert RunningScore().normalise(torch.tensor([3.0, 3.0, 3.0])).tolist() == [0.0, 0.0, 0.0]
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (3, 1, 5)]
    running = RunningScore()
    for end, batch in enumerate(batches, 1):
        got = running.normalise(batch)
        seen = torch.cat(batches[:end])
        torch.testing.assert_close(got, (batch - seen.mean()) / (seen.std() + 1e-8))


def test_21_normalise_then_clip_then_penalise(scored, config):
    scores = torch.tensor([10.0, -10.0, 10.2, 9.8], dtype=torch.float64)
    settings = config(ppo_score_norm=True, score_clip=0.25, missing_eos_penalty=1.0)
    shaped = shape_score(replace(scored, score_B=scores), settings, RunningScore())
    # Clipped first, the three high scores would be equal after normalising and -10 would not be
    # -0.25.
    assert shaped.tolist() == [0.25, -1.25, 0.25, 0.25]


def test_21_clip_leaves_the_kl_alone(scored, config):
    settings = config(score_clip=0.01, whiten_advantages=False)
    experience = estimate(scored, settings, controller(100.0), RunningScore())
    assert experience.reward_N.abs().max() > 1.0


def test_25_returns_are_unwhitened_advantages_plus_old_values(scored, config):
    plain = estimate(scored, config(whiten_advantages=False), controller(), RunningScore())
    whitened = estimate(scored, config(whiten_advantages=True), controller(), RunningScore())
    torch.testing.assert_close(plain.return_N, plain.advantage_N + scored.value_N.float())
    assert torch.equal(plain.return_N, whitened.return_N)
    assert not torch.allclose(plain.advantage_N, whitened.advantage_N)


def test_26_whitening_is_over_the_whole_rollout(scored, config):
    got = estimate(scored, config(), controller(), RunningScore()).advantage_N
    assert got.mean().abs() < 1e-5
    assert (got.std() - 1).abs() < 1e-5


@pytest.mark.parametrize(
    ("name", "kind"), [("kl", "k1"), ("abs", "abs"), ("mse", "k2"), ("low_var_kl", "k3")]
)
def test_kl_names_by_hand(scored, config, name, kind):
    difference = scored.logprob_N - scored.ref_logprob_N
    by_hand = {
        "k1": difference,
        "abs": difference.abs(),
        "k2": difference.square() / 2,
        "k3": (-difference).exp() - 1 + difference,
    }[kind]
    got = estimate(scored, config(kl_penalty=name), controller(), RunningScore()).kl_N
    torch.testing.assert_close(got.double(), by_hand, atol=1e-6, rtol=1e-6)


def test_15_truncated_and_too_short_responses_may_get_a_fixed_score(scored, config):
    # Responses of 1, 3 (cut off), 5 and 2 tokens.
    settings = config(penalise_no_eos=True, min_response_length=2, reward_penalty=-4.0)
    shaped = shape_score(scored, settings, RunningScore()).tolist()
    kept = scored.score_B.tolist()
    assert shaped == [-4.0, -4.0, kept[2], kept[3]]
    short = shape_score(scored, config(min_response_length=3), RunningScore()).tolist()
    assert short == [-3.0, kept[1], kept[2], -3.0]


def test_20_use_score_scaling_divides_and_with_use_score_norm_centres_too(scored, config):
    score_B = scored.score_B
    scaled = shape_score(scored, config(use_score_scaling=True), RunningScore())
    torch.testing.assert_close(scaled, score_B / score_B.std())
    both = {"use_score_scaling": True, "use_score_norm": True}
    centred = shape_score(scored, config(**both), RunningScore())
    torch.testing.assert_close(centred, (score_B - score_B.mean()) / score_B.std())
    ours = shape_score(scored, config(ppo_score_norm=True), RunningScore())
    assert torch.equal(centred, ours)


def test_21_a_fixed_score_is_neither_normalised_nor_clipped(scored, config):
    settings = config(
        ppo_score_norm=True, score_clip=0.1, penalise_no_eos=True, reward_penalty=-9.0
    )
    assert shape_score(scored, settings, RunningScore())[1] == -9.0
