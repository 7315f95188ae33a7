"""Advantages without a critic, the critic's warm-up, the exact KL, the sampler's correction."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace

import pytest
import torch

from fastppo.errors import UserError
from fastppo.ops.losses import group_advantages
from fastppo.ppo import checkpoint, trainer
from fastppo.ppo.advantage import KLController, RunningScore, estimate
from fastppo.ppo.columns import CRITIC_COLUMNS
from fastppo.ppo.evaluation import evaluate
from fastppo.ppo.lines import notices
from fastppo.ppo.metrics import sampler_columns
from fastppo.ppo.optimizer import make_optimizer
from fastppo.ppo.state import total_steps
from fastppo.ppo.update import update
from fastppo.run.preflight import check
from fastppo.types import Scored

CRITICLESS = ["grpo", "rloo", "reinforce++"]


def adapter_of(run):
    return torch.cat([p.detach().flatten() for p in run.roles.trainable_parameters("actor")])


def critic_of(run):
    return torch.cat([p.detach().flatten() for p in run.roles.trainable_parameters("critic")])


@pytest.fixture
def scored(rollout) -> Scored:
    """Four responses of 1, 3, 5 and 2 tokens: two to each of two prompts, say. No critic."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 11, generator=generator, dtype=torch.float64)
    return Scored(
        rollout=rollout,
        offsets=torch.tensor([0, 1, 4, 9, 11], dtype=torch.int32),
        logprob_N=noise[0] - 3,
        ref_logprob_N=noise[1] - 3,
        entropy_N=noise[2].abs(),
        score_B=torch.tensor([1.0, 2.0, 6.0, 0.5], dtype=torch.float64),
    )


def returns_by_hand(scored, beta):
    kl_N = scored.logprob_N - scored.ref_logprob_N
    kl_B = torch.stack([part.sum() for part in kl_N.split([1, 3, 5, 2])])
    return scored.score_B - beta * kl_B


def of(scored, settings, beta=0.1):
    return estimate(scored, settings, KLController(beta, 6.0, 10000), RunningScore())


def test_rloo_is_the_return_less_the_mean_of_the_others(scored, config):
    r = returns_by_hand(scored, 0.1)
    got = of(scored, config(advantage="rloo", num_generations=4)).advantage_N
    others = torch.stack([(r.sum() - r[i]) / 3 for i in range(4)])
    expected = (r - others).repeat_interleave(torch.tensor([1, 3, 5, 2]))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_grpo_is_the_return_in_deviations_of_its_prompts_own(scored, config):
    r = returns_by_hand(scored, 0.1)
    first, second = r[:2], r[2:]
    expected = torch.cat([(g - g.mean()) / (g.std() + 1e-4) for g in (first, second)])
    got = of(scored, config(advantage="grpo", num_generations=2)).advantage_N
    last = scored.offsets[1:].long() - 1
    torch.testing.assert_close(got[last], expected, atol=1e-12, rtol=0)
    assert got[4] == got[8]  # one advantage for all tokens of a response


def test_scale_rewards_divides_by_the_group_the_batch_or_not_at_all():
    r = torch.tensor([1.0, 3.0, 10.0, 30.0], dtype=torch.float64)
    centred = torch.tensor([-1.0, 1.0, -10.0, 10.0], dtype=torch.float64)
    deviation = {"group": torch.tensor([2.0, 2.0, 200.0, 200.0]).sqrt(), "batch": r.std()}
    for scale in ("group", "batch", "none"):
        got = group_advantages(r, 2, kind="grpo", scale=scale)
        expected = centred if scale == "none" else centred / (deviation[scale] + 1e-4)
        torch.testing.assert_close(got, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_responses_that_are_all_alike_teach_nothing(advantage):
    assert not group_advantages(torch.full((4,), 3.3), 4, kind=advantage).any()


def test_reinforce_plus_plus_is_the_reward_to_go_whitened(scored, config):
    settings = config(advantage="reinforce++", whiten_advantages=False, gamma=0.9)
    plain = of(scored, settings)
    reward = plain.reward_N.split([1, 3, 5, 2])
    expected = torch.cat(
        [
            torch.stack([sum(0.9**k * r[t + k] for k in range(len(r) - t)) for t in range(len(r))])
            for r in reward
        ]
    )
    torch.testing.assert_close(plain.advantage_N, expected, atol=1e-12, rtol=0)
    whitened = of(scored, config(advantage="reinforce++")).advantage_N
    assert whitened.mean().abs() < 1e-12
    assert whitened.std().item() == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize(
    "advantage",
    [
        # Its curves are drawn in the slow tier, by the others.
        pytest.param(name, marks=() if name == "grpo" else (pytest.mark.slow, pytest.mark.pictures))
        for name in CRITICLESS
    ],
)
def test_without_a_critic_none_is_built_trained_saved_or_logged(state, tmp_path, advantage):
    changes = {"advantage": advantage, "num_generations": 2, "max_steps": 3}
    run = state(metrics_dir=str(tmp_path / "straight"), **changes)
    names = {name for name, _ in run.roles.model.named_parameters()}
    assert not any(".critic." in name for name in names)
    assert run.roles.trainable_parameters("critic") == []
    assert [group["role"] for group in run.optimizer.param_groups] == ["actor"]
    before = adapter_of(run)
    trainer.step_update(run)
    checkpoint.save_to_resume(run, tmp_path)
    assert not torch.equal(before, adapter_of(run))
    assert not list((tmp_path / "checkpoint-1").glob("**/value_head*"))
    for _ in range(2):
        trainer.step_update(run)
    evaluate(run)  # the curves too
    with (tmp_path / "straight" / "training_metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert not CRITIC_COLUMNS & set(rows[0])
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    again = {"metrics_dir": str(tmp_path / "resumed"), "output_dir": str(tmp_path / "again")}
    resumed = state(**again, **changes)
    checkpoint.resume(resumed, tmp_path / "checkpoint-1")
    for _ in range(2):
        trainer.step_update(resumed)
    assert torch.equal(adapter_of(resumed), adapter_of(run))


def test_a_whole_run_without_a_critic_says_so(config, capsys):
    settings = config(advantage="grpo", num_generations=2)
    trainer.run(settings, check(settings))
    out = capsys.readouterr().out
    assert "4 responses to 2 prompts" in out
    assert re.search(r"critic +none +0 *\n", out)


def test_num_generations_repeats_prompts_side_by_side_and_counts_epochs_by_prompts(state):
    run = state(advantage="grpo", num_generations=2)
    texts = [prompt.text for prompt in trainer.next_prompts(run)]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    # Two prompts a step: four prompts are an epoch in two.
    assert total_steps(run.config.model_copy(update={"max_steps": -1}), 4) == 6
    row = trainer.step_update(run).metrics.rows[0]
    assert row["epoch"] == 0.5


def test_keys_of_the_critic_get_a_note_that_they_have_no_effect(config):
    settings = config(advantage="rloo", num_generations=2, critic="shared", lam=0.9)
    assert any(line.startswith("critic, lam: nothing to") for line in notices(settings, 1000))
    assert not any("nothing to" in line for line in notices(config(critic="shared"), 1000))


@pytest.mark.parametrize("critic", ["adapter", "shared"])
def test_46_critic_warm_up_leaves_the_actors_lora_and_beta_bit_identical(state, critic):
    run = state(critic=critic, critic_warmup=2, horizon=50, weight_decay=0.1, max_steps=3)
    lora, head = adapter_of(run), critic_of(run)
    for _ in range(2):
        trainer.step_update(run)
        assert torch.equal(adapter_of(run), lora)
        assert run.controller.kl_coef == 0.2
    assert not torch.equal(critic_of(run), head)
    assert run.metrics.rows[1]["grad_norm_actor"] == 0.0
    assert run.metrics.rows[1]["kl"] == 0.0
    trainer.step_update(run)
    assert not torch.equal(adapter_of(run), lora)
    assert run.metrics.rows[2]["grad_norm_actor"] > 0.0


def test_10_kl_penalty_full_is_the_kl_over_the_whole_vocabulary(
    tiny_roles, config, rollout, experience_of
):
    made = tiny_roles()
    got = experience_of(made, rollout, config(kl_penalty="full", temperature=1.3))
    expected = []
    for row in range(4):
        ids = rollout.input_ids_BT[row : row + 1, : rollout.lengths[row]]
        logs = []
        for role in ("actor", "reference"):
            with torch.no_grad(), made.use(role):
                logs.append((made.base(input_ids=ids).logits[0] / 1.3).double().log_softmax(-1))
        kl_T = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
        expected.append(kl_T[rollout.prompt_lengths[row] - 1 : -1])
    torch.testing.assert_close(got.kl_N.double(), torch.cat(expected), atol=1e-5, rtol=1e-4)
    assert (got.kl_N >= 0).all()
    inner = got.reward_N[got.scored.offsets[1] : got.scored.offsets[2] - 1]
    torch.testing.assert_close(inner, -0.1 * got.kl_N[1:3])


def test_an_exact_kl_between_heads_of_two_kinds_is_refused(
    tiny_roles, config, rollout, experience_of, monkeypatch
):
    made = tiny_roles()
    own = type(made).lm_head.fget

    def capped(roles):
        return own(roles)._replace(softcap=30.0 if roles._active == "reference" else None)

    monkeypatch.setattr(type(made), "lm_head", property(capped))
    with pytest.raises(
        UserError, match="kl_penalty: full: the reference has an output bias, scale or"
    ):
        experience_of(made, rollout, config(kl_penalty="full"))


def test_08_scoring_with_the_exact_kl_gives_the_log_probs_of_the_update(
    tiny_roles, config, rollout, experience_of
):
    settings = config(kl_penalty="full", learning_rate=0.0, critic_learning_rate=0.0)
    made = tiny_roles()
    experience = experience_of(made, rollout, settings)
    learned = update(made, experience, settings, make_optimizer(settings, made), seed=0)
    assert learned["ratio_first_pass"] == 0.0


def test_the_controller_follows_the_kl_that_the_reward_holds(state, monkeypatch):
    run = state(kl_penalty="full")
    seen = []
    monkeypatch.setattr(run.controller, "update", lambda kl, n: seen.append((kl, n)))
    for _ in range(2):
        row = trainer.step_update(run).metrics.rows[-1]
        assert seen[-1] == (row["kl_controlled"], 4)
    assert row["kl_controlled"] != row["kl"]


def test_39_sampler_and_trainer_that_disagree_are_measured_and_corrected(scored, config):
    """The first token was 3 times likelier in the trainer than it was sampled, the rest half as."""
    gap_N = torch.full((11,), math.log(0.5), dtype=torch.float64)
    gap_N[0] = math.log(3.0)
    rollout = replace(scored.rollout, sampler_logprob_N=scored.logprob_N - gap_N)
    settings = config(advantage="reinforce++", rollout_is_threshold=2.0)
    weight_N = of(replace(scored, rollout=rollout), settings).importance_weight_N
    expected = torch.tensor([2.0] + [0.5] * 10, dtype=torch.float64)
    torch.testing.assert_close(weight_N, expected)
    off = config(advantage="reinforce++")
    assert of(scored, off).importance_weight_N is None


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # By response the ratios are 3, 1/8, 1/32 and 1/4; the bounds 1/8 - 0.001 and 2.
        ("token_mask", [0.0] + [0.5] * 10),
        ("sequence_truncate", [2.0] + [0.125] * 3 + [0.124] * 5 + [0.25] * 2),
        ("sequence_mask", [0.0] + [0.125] * 3 + [0.0] * 5 + [0.25] * 2),
    ],
)
def test_39_weights_by_token_and_by_response(scored, config, mode, expected):
    gap_N = torch.full((11,), math.log(0.5), dtype=torch.float64)
    gap_N[0] = math.log(3.0)
    rollout = replace(scored.rollout, sampler_logprob_N=scored.logprob_N - gap_N)
    settings = config(advantage="reinforce++", rollout_is=mode, rollout_is_lower=0.124)
    experience = of(replace(scored, rollout=rollout), settings)
    expected_N = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(experience.importance_weight_N, expected_N)
    row = sampler_columns(experience, settings)
    assert row["sampler_gap_max"] == pytest.approx(math.log(3.0))
    assert row["rollout_is_masked"] == pytest.approx(sum(x == 0 for x in expected) / 11)
    assert row["rollout_is_mean"] == pytest.approx(sum(expected) / 11)
    effective = sum(expected) ** 2 / sum(x * x for x in expected) / 11
    assert row["rollout_is_ess"] == pytest.approx(effective)


def test_39_a_rollout_that_is_masked_whole_has_no_effective_tokens(scored, config):
    rollout = replace(scored.rollout, sampler_logprob_N=scored.logprob_N - 5.0)
    settings = config(advantage="reinforce++", rollout_is="token_mask")
    row = sampler_columns(of(replace(scored, rollout=rollout), settings), settings)
    assert (row["rollout_is_masked"], row["rollout_is_ess"]) == (1.0, 0.0)


def test_39_the_correction_says_what_it_cannot_see(config):
    def said(**changes):
        return [line for line in notices(config(**changes), 2) if line.startswith("rollout_is:")]

    (line,) = said(rollout_is="token_mask", top_p=0.9, min_new_tokens=2)
    assert "with top_p, min_new_tokens the sampler draws" in line
    assert not said(rollout_is="token_mask")
    assert not said(top_p=0.9)


def test_39_the_weights_and_how_many_met_the_cap_are_logged(state):
    run = state(rollout_is_threshold=1.5, top_k=5)  # truncated sampling: the two differ
    row = trainer.step_update(run).metrics.rows[0]
    assert 0.0 < row["rollout_is_mean"] < 1.0
    assert row["rollout_is_capped"] == 0.0


def test_45_length_bias_shows_in_the_metrics(state, monkeypatch):
    run = state(max_new_tokens=12)
    monkeypatch.setattr(
        type(run.reward),
        "__call__",
        lambda _, rollout: (torch.tensor(rollout.response_lengths).float(), {}),
    )
    row = trainer.step_update(run).metrics.rows[0]
    varied = row["score_std"] > 0
    assert row["score_length_corr"] == pytest.approx(1.0 if varied else 0.0)
    assert 0.0 <= row["eos_share"] <= 1.0
    assert row["response_length_max"] <= 12
