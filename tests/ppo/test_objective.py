"""The trainer's loss with all its settings: against its formula, and however it is split."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from fastppo.models.batch import Budget, make_batch, token_weights
from fastppo.ops import PolicyLossConfig, head
from fastppo.ppo.update import Totals, forward_backward, mini_batches, policy_loss_config
from tests.gradients import gradient
from tests.tiers import slow_unless

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
LEVELS = ["token", "sequence"]
LENGTHS = [1, 3, 5, 2]  # of the rollout's responses
# Between the two clips and past them, on either side, for either sign; and past the dual clip.
LOG_RATIO = [0.25, 0.25, -0.15, 0.6, -0.15, -0.5, 0.6, 0.25, -0.5, 0.0, -0.15]
ADVANTAGE = [1.0, -1.0, -0.5, 2.0, 0.7, -1.2, -0.8, 0.4, 1.5, -0.3, -1.1]
EVERYTHING = {
    "cliprange_low": 0.1,
    "cliprange_high": 0.3,
    "dual_clip": 1.5,
    "use_kl_loss": True,
    "entropy_coef": 0.05,
    "rollout_is_threshold": 0.02,
    "temperature": 1.2,
}


@pytest.fixture
def moved(tiny_roles, rollout, experience_of, config):
    """Float64 roles, and an experience as if updates had moved the policy past every clip."""

    def make(**changes):
        settings = config(**changes)
        made = tiny_roles(**changes)
        made.model.double()
        if made.has_critic:
            made.critic_head.double()
        sampled = replace(rollout, sampler_logprob_N=torch.linspace(-4, -1, 11).double())
        experience = experience_of(made, sampled, settings)
        log_ratio_N = torch.tensor(LOG_RATIO, dtype=torch.float64)
        scored = replace(experience.scored, logprob_N=experience.scored.logprob_N - log_ratio_N)
        advantage_N = torch.tensor(ADVANTAGE, dtype=torch.float64)
        return made, replace(experience, scored=scored, advantage_N=advantage_N), settings

    return make


@pytest.mark.parametrize("critic", ["adapter", "shared"])
def test_30_31_micro_batches_add_up_to_the_gradient_of_the_whole(moved, critic):
    """Ragged responses of 1 to 5 tokens, in float64: a mean of means would be off by far more."""
    parts = moved(critic=critic)
    whole = gradient(*parts, Budget(rows=4))
    assert whole.abs().max() > 1e-4
    for size in (1, 2, 3):
        torch.testing.assert_close(gradient(*parts, Budget(rows=size)), whole, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "loss",
    slow_unless(
        lambda loss: loss in ("gspo", "sapo"), ["gspo", "cispo", "sapo", "dppo_kl", "reinforce"]
    ),
)
def test_30_so_they_do_for_every_loss(moved, loss):
    parts = moved(policy_loss=loss, loss_agg_mode="seq-mean-token-mean", use_kl_loss=True)
    whole = gradient(*parts, Budget(rows=4))
    assert whole.abs().max() > 1e-4
    for size in (1, 2):
        torch.testing.assert_close(gradient(*parts, Budget(rows=size)), whole, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("mode", "level"),
    slow_unless(
        lambda *pair: pair in (("token-mean", "sequence"), ("seq-mean-token-mean", "token")),
        product(MODES, LEVELS),
    ),
)
def test_30_so_they_do_for_every_aggregation_and_ratio_level(moved, mode, level):
    parts = moved(loss_agg_mode=mode, importance_sampling_level=level, **EVERYTHING)
    whole = gradient(*parts, Budget(rows=4))
    assert whole.abs().max() > 1e-4
    for size in (1, 2):
        torch.testing.assert_close(gradient(*parts, Budget(rows=size)), whole, atol=1e-10, rtol=0)


def test_aggregation_modes_by_hand():
    # Two responses of 1 and 3 tokens, max_new_tokens 8.
    assert token_weights([1, 3], "token-mean", 8) == [1 / 4, 1 / 4]
    assert token_weights([1, 3], "seq-mean-token-mean", 8) == [1 / 2, 1 / 6]
    assert token_weights([1, 3], "seq-mean-token-sum", 8) == [1 / 2, 1 / 2]
    assert token_weights([1, 3], "seq-mean-token-sum-norm", 8) == [1 / 16, 1 / 16]


def plain_loss(made, experience, settings):
    """The actor's loss as docs/ppo.md has it, from the model's own logits, row by row."""
    rollout, total = experience.scored.rollout, 0.0
    pieces = {
        name: x_N.split(LENGTHS)
        for name, x_N in {
            "behaviour": experience.scored.logprob_N,
            "ref": experience.scored.ref_logprob_N,
            "advantage": experience.advantage_N,
            "importance": experience.importance_weight_N,
        }.items()
    }
    for row in range(4):
        begin, end = rollout.prompt_lengths[row], rollout.lengths[row]
        ids = rollout.input_ids_BT[row : row + 1, :end]
        logits = made.base(input_ids=ids).logits[0, begin - 1 : end - 1] / settings.temperature
        every = logits.log_softmax(-1)
        logprob = every.gather(1, ids[0, begin:, None]).squeeze(1)
        log_ratio = logprob - pieces["behaviour"][row]
        if settings.importance_sampling_level == "sequence":  # GSPO-token: gae's advantages differ
            log_ratio = log_ratio.mean().detach() + logprob - logprob.detach()
        ratio, advantage = log_ratio.exp(), pieces["advantage"][row]
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.9, 1.3))
        loss = torch.where(advantage < 0, torch.minimum(loss, -1.5 * advantage), loss)
        loss = loss * pieces["importance"][row]
        off = pieces["ref"][row] - logprob
        loss = loss + experience.kl_coef * (off.exp() - 1 - off)
        loss = loss - settings.entropy_coef * -(every.exp() * every).sum(-1)
        total = total + loss.mean() / 4  # seq-mean-token-mean
    return total


@pytest.mark.parametrize("level", LEVELS)
def test_48_the_fused_loss_has_the_gradient_of_plain_pytorch(moved, level):
    """Every setting at once, in float64, through the whole model."""
    made, experience, settings = moved(
        loss_agg_mode="seq-mean-token-mean", importance_sampling_level=level, **EVERYTHING
    )
    gradient(made, experience, settings, Budget(rows=2))
    actor = made.trainable_parameters("actor")
    fused = torch.cat([p.grad.flatten() for p in actor])
    with made.use("actor"):
        grads = torch.autograd.grad(plain_loss(made, experience, settings), actor)
    plain = torch.cat([g.flatten() for g in grads])
    torch.testing.assert_close(fused, plain, atol=1e-9, rtol=1e-7)


def test_48_a_ratio_by_response_keeps_a_critics_advantages_by_token(moved):
    """Two tokens of advantage +1 and -1: their mean is 0, but neither is without gradient.

    In plain GSPO each of them moves both alike, and the response learns nothing.
    """
    made, experience, settings = moved(
        loss_agg_mode="token-mean",
        importance_sampling_level="sequence",
        cliprange=20.0,
        temperature=1.2,
    )
    advantage_N = torch.zeros(11, dtype=torch.float64)
    advantage_N[9], advantage_N[10] = 1.0, -1.0
    experience = replace(experience, advantage_N=advantage_N)
    gradient(made, experience, settings, Budget(rows=4))
    actor = torch.cat([p.grad.flatten() for p in made.trainable_parameters("actor")])
    assert actor.abs().max() > 1e-6


def test_each_setting_of_the_loss_changes_the_gradient(moved):
    """Otherwise the test above could not tell a setting that is never passed on."""
    full = {**EVERYTHING, "loss_agg_mode": "seq-mean-token-mean"}
    reference = gradient(*moved(**full), Budget(rows=4))
    for name in ("cliprange_low", "cliprange_high", "dual_clip", "use_kl_loss", "entropy_coef"):
        less = {key: value for key, value in full.items() if key != name}
        assert (gradient(*moved(**less), Budget(rows=4)) - reference).abs().max() > 1e-6, name


def test_keys_reach_the_operator_under_its_names(config):
    assert policy_loss_config(config()) == PolicyLossConfig()
    settings = config(
        cliprange=0.1,
        cliprange_high=0.28,
        dual_clip=3.0,
        kl_loss_type="mse",
        entropy_coef=0.01,
        policy_loss="gspo",
        sapo_temperature_pos=2.0,
        sapo_temperature_neg=3.0,
    )
    expected = PolicyLossConfig(
        clip_low=0.1,
        clip_high=0.28,
        dual_clip=3.0,
        kl_kind="k2",
        entropy_coef=0.01,
        tau_pos=2.0,
        tau_neg=3.0,
    )
    assert policy_loss_config(settings) == expected


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dual_clip_bounds_dppos_ratio_as_verls_clip_ratio_c_does(name, config):
    """It may lie below 1 + cliprange there, which is a divergence and no bound of a ratio."""
    assert policy_loss_config(config(policy_loss=name)).ratio_limit == 20
    found = policy_loss_config(config(policy_loss=name, dual_clip=1.1))
    assert (found.ratio_limit, found.dual_clip) == (1.1, None)
    clipped = policy_loss_config(config(dual_clip=3.0))
    assert (clipped.ratio_limit, clipped.dual_clip) == (20, 3.0)


def test_with_use_kl_loss_the_reward_holds_no_kl(tiny_roles, config, rollout, experience_of):
    made = tiny_roles()
    inside = experience_of(made, rollout, config())
    outside = experience_of(made, rollout, config(use_kl_loss=True))
    assert torch.equal(inside.kl_N, outside.kl_N)
    assert outside.kl_coef == inside.kl_coef == 0.1
    difference = outside.reward_N - inside.reward_N
    torch.testing.assert_close(difference, 0.1 * inside.kl_N, atol=1e-6, rtol=0)
    assert difference.abs().max() > 1e-3


def test_40_entropy_and_loss_never_hold_logits_of_the_whole_batch(
    tiny_roles, config, rollout, experience_of, monkeypatch
):
    """Eleven tokens, room for the logits of two: the entropy bonus needs no full softmax either."""
    settings = config(entropy_coef=0.01)
    made = tiny_roles()
    experience = experience_of(made, rollout, settings)
    (mini,) = mini_batches(experience, settings, seed=0)
    made_at_a_time, logits = [], head.Head.logits

    def counted(self, hidden_ND, into_NV):
        made_at_a_time.append(len(hidden_ND))
        return logits(self, hidden_ND, into_NV)

    monkeypatch.setattr(head.Head, "logits", counted)
    monkeypatch.setattr(head, "_CHUNK_BYTES_CPU", 2 * 4 * made.lm_head.weight_VD.shape[0])
    monkeypatch.setattr(head, "_CHUNK_ROWS_CPU", 1)
    forward_backward(made, experience, make_batch(rollout, mini.rows), mini, settings, Totals())
    assert (max(made_at_a_time), sum(made_at_a_time)) == (2, 11)
