"""PPO's update: ratio 1 before it, the same gradient however the batch is split, clean guards."""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastppo.config.effect import without_effect
from fastppo.errors import TrainingStopped
from fastppo.models.batch import Budget, make_batch, token_index
from fastppo.ppo.optimizer import make_optimizer
from fastppo.ppo.score import score, token_scores
from fastppo.ppo.update import check_first_pass, clip_and_step, mini_batches, update


def flat(made):
    """Every trained weight, in one vector."""
    both = [*made.trainable_parameters("actor"), *made.trainable_parameters("critic")]
    return torch.cat([p.detach().flatten() for p in both])


def all_parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_05_a_token_is_scored_by_the_state_before_it(tiny_roles, rollout, vowels):
    """Against the plain model, token by token, one row at a time."""
    made = tiny_roles()
    scored = score(made, rollout, vowels(rollout), temperature=1.0, budget=Budget(rows=4))
    expected, values = [], []
    for row in range(4):
        ids = rollout.input_ids_BT[row : row + 1, : rollout.lengths[row]]
        with torch.no_grad(), made.use("actor"):
            logprobs = made.base(input_ids=ids).logits[0].log_softmax(-1)
        with torch.no_grad(), made.use("critic"):
            hidden = made.hidden(ids, torch.ones_like(ids))[0]
        for t in range(rollout.prompt_lengths[row], rollout.lengths[row]):
            expected.append(logprobs[t - 1, ids[0, t]])
            values.append(made.critic_head(hidden[t - 1])[0].detach())
    torch.testing.assert_close(scored.logprob_N, torch.stack(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.value_N, torch.stack(values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("critic", ["adapter", "shared"])
def test_08_ratio_is_bitwise_1_before_the_first_update(
    tiny_roles, config, rollout, critic, experience_of
):
    settings = config(critic=critic, learning_rate=0.0, critic_learning_rate=0.0)
    made = tiny_roles(critic=critic)
    experience = experience_of(made, rollout, settings)
    learned = update(made, experience, settings, make_optimizer(settings, made), seed=0)
    assert learned["ratio_first_pass"] == 0.0
    assert learned["ratio_mean"] == learned["ratio_max"] == 1.0
    assert learned["clipfrac"] == 0.0


def test_08_other_micro_batches_change_it_by_rounding_only(
    tiny_roles, config, rollout, experience_of
):
    settings = config(ppo_micro_batch_size_per_gpu=2)
    made = tiny_roles()
    experience = experience_of(made, rollout, settings, batch_size=1)
    learned = update(made, experience, settings, make_optimizer(settings, made), seed=0)
    assert learned["ratio_first_pass"] <= 1e-5


def test_08_a_ratio_off_before_any_update_stops_the_run(tiny_roles, config, rollout, experience_of):
    settings = config()
    made = tiny_roles()
    experience = experience_of(made, rollout, settings)
    moved = replace(
        experience, scored=replace(experience.scored, logprob_N=experience.scored.logprob_N + 0.01)
    )
    with pytest.raises(TrainingStopped, match=r"before the first update.*likeliest cause"):
        update(made, moved, settings, make_optimizer(settings, made), seed=0)
    check_first_pass(0.1, "bfloat16")
    check_first_pass(float("nan"), "float32")  # that is for the guard of max_bad_steps


def test_31_gradients_start_from_zero_in_every_optimiser_step(
    tiny_roles, config, rollout, experience_of
):
    settings = config(ppo_epochs=1)
    results = []
    for dirty in (False, True):
        made = tiny_roles()
        experience = experience_of(made, rollout, settings)
        for parameter in made.trainable_parameters("actor") if dirty else []:
            parameter.grad = torch.full_like(parameter, 100.0)
        update(made, experience, settings, make_optimizer(settings, made), seed=0)
        results.append(torch.cat([p.flatten() for p in made.trainable_parameters("actor")]))
    assert torch.equal(*results)


def test_32_each_role_is_clipped_once_by_its_own_norm(tiny_roles, config):
    settings = config(max_grad_norm=0.5, critic="adapter")
    made = tiny_roles(critic="adapter")
    optimizer = make_optimizer(settings, made)
    for role, size in (("actor", 3.0), ("critic", 0.001)):
        for parameter in made.trainable_parameters(role):
            parameter.grad = torch.full_like(parameter, size)
    critic_before = [p.grad.clone() for p in made.trainable_parameters("critic")]
    norms, taken = clip_and_step(optimizer, settings.max_grad_norm, torch.tensor(True))
    assert taken
    actor = torch.cat([p.grad.flatten() for p in made.trainable_parameters("actor")])
    assert actor.norm().item() == pytest.approx(0.5, rel=1e-3)
    assert norms["actor"].item() == pytest.approx(3.0 * actor.numel() ** 0.5, rel=1e-4)
    after = [p.grad for p in made.trainable_parameters("critic")]
    assert all(torch.equal(a, b) for a, b in zip(critic_before, after, strict=True))


def test_33_adams_epsilon_is_the_one_asked_for(tiny_roles, config):
    settings = config(adam_epsilon=1e-5, learning_rate=1e-4, critic_learning_rate=1e-3)
    made = tiny_roles()
    groups = make_optimizer(settings, made).param_groups
    assert [group["eps"] for group in groups] == [1e-5, 1e-5]
    assert [group["lr"] for group in groups] == [1e-4, 1e-3]


def test_36_every_epoch_takes_every_row_once_in_an_order_of_its_own(
    tiny_roles, config, rollout, experience_of
):
    settings = config(per_device_train_batch_size=1, ppo_buffer_size=4)
    experience = experience_of(tiny_roles(), rollout, settings)
    orders = [
        [row for mini in mini_batches(experience, settings, seed) for row in mini.rows]
        for seed in range(8)
    ]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert orders[0] == [row for mini in mini_batches(experience, settings, 0) for row in mini.rows]


def test_29_a_runaway_ratio_teaches_nothing(
    tiny_roles, config, rollout, monkeypatch, experience_of
):
    """At 1e8 the ratios are finite, their mean is past ratio_threshold, and no step is taken."""
    settings = config(ratio_threshold=10.0, ppo_epochs=3, weight_decay=0.1)
    made = tiny_roles()
    experience = experience_of(made, rollout, settings)
    far = replace(
        experience, scored=replace(experience.scored, logprob_N=experience.scored.logprob_N - 100.0)
    )
    monkeypatch.setattr("fastppo.ppo.update.check_first_pass", lambda *_: None)
    optimizer = make_optimizer(settings, made)
    before = flat(made)
    learned = update(made, far, settings, optimizer, seed=0)
    assert (learned["optimizer_steps"], learned["skipped_steps"]) == (0.0, 3.0)
    assert all(math.isfinite(value) for value in learned.values())
    assert torch.equal(before, flat(made))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_44_a_gradient_that_is_not_finite_skips_the_step(tiny_roles, config, bad):
    settings = config(weight_decay=0.1)
    made = tiny_roles()
    optimizer = make_optimizer(settings, made)
    for parameter in all_parameters(optimizer):
        parameter.grad = torch.ones_like(parameter)
    clip_and_step(optimizer, 1.0, torch.tensor(True))
    before, moments = flat(made), copy.deepcopy(optimizer.state_dict()["state"])
    made.trainable_parameters("actor")[0].grad[0, 0] = bad
    norms, taken = clip_and_step(optimizer, 1.0, torch.tensor(True))
    assert not taken
    assert not norms["actor"].isfinite()
    assert torch.equal(before, flat(made))
    for index, kept in moments.items():
        now = optimizer.state_dict()["state"][index]
        assert all(torch.equal(kept[name], now[name]) for name in kept)


def test_43_responses_of_nothing_but_eos_train_without_nan(
    tiny_roles, config, template, experience_of, lay_out
):
    rollout = lay_out(["Hi", "What?"], [[template.eos_id], [template.eos_id]])
    settings = config(per_device_train_batch_size=2)
    made = tiny_roles()
    experience = experience_of(made, rollout, settings)
    learned = update(made, experience, settings, make_optimizer(settings, made), seed=0)
    assert all(math.isfinite(value) for value in learned.values())
    assert flat(made).isfinite().all()


@pytest.mark.parametrize("early_stopping", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_host_reads_the_device_no_more_than_once_an_optimiser_step(
    tiny_roles, config, rollout, monkeypatch, early_stopping, experience_of
):
    """Eight steps of four micro-batches: the first pass, the end, and with early_stopping a step.

    Reads from within operators, transformers and torch's optimiser are theirs.
    """
    settings = config(
        ppo_epochs=8,
        ppo_micro_batch_size_per_gpu=1,
        early_stopping=early_stopping,
        target_kl=100.0,
    )
    made = tiny_roles()
    experience = experience_of(made, rollout, settings, batch_size=1)
    optimizer = make_optimizer(settings, made)
    reads = []

    def counted(name):
        original = getattr(torch.Tensor, name)

        def read(tensor, *args):
            caller = sys._getframe(1).f_code
            if Path(caller.co_filename).parent.name == "ppo":
                reads.append(caller.co_name)
            return original(tensor, *args)

        return read

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    update(made, experience, settings, optimizer, seed=0)
    assert Counter(reads) == {"update": 1 + 8 * early_stopping, "read": 1}


def test_early_stopping_takes_no_step_past_the_limit(tiny_roles, config, rollout, experience_of):
    settings = config(early_stopping=True, target_kl=1e-6, ppo_epochs=4, learning_rate=0.05)
    made = tiny_roles()
    experience = experience_of(made, rollout, settings)
    learned = update(made, experience, settings, make_optimizer(settings, made), seed=0)
    assert learned["early_stopped"] == 1.0
    assert learned["optimizer_steps"] < 4


@pytest.mark.parametrize("critic", ["adapter", "shared"])
def test_an_update_raises_what_was_better_and_lowers_what_was_worse(
    tiny_roles, config, rollout, critic, experience_of
):
    settings = config(critic=critic, ppo_epochs=4, learning_rate=5e-3, vf_coef=0.0)
    made = tiny_roles(critic=critic)
    experience = experience_of(made, rollout, settings)
    advantage = experience.advantage_N
    update(made, experience, settings, make_optimizer(settings, made), seed=0)
    batch = make_batch(rollout, range(4))
    with torch.no_grad(), made.use("actor"):
        now = token_scores(
            made, made.hidden(batch.input_ids_BT, batch.mask_BT), batch, 1.0
        ).logprob_N
    change = now - experience.scored.logprob_N
    assert (change * advantage).sum() > 0
    assert change[advantage.argmax()] > 0 > change[advantage.argmin()]


@pytest.mark.parametrize(
    ("low", "high", "limit"),
    [pytest.param(0.1, 10.0, 0.0, marks=pytest.mark.slow), (0.1, 10.0, 1e-3)],
)
@pytest.mark.parametrize(("critic", "acts"), [("adapter", False), ("shared", True)])
def test_vf_coef_acts_on_a_trunk_that_actor_and_critic_share(
    tiny_roles, config, rollout, critic, acts, experience_of, low, high, limit
):
    """A hundredfold vf_coef, gradients clipped or not: a critic of its own ends the same."""
    ends = []
    for vf_coef in (low, high):
        settings = config(critic=critic, ppo_epochs=4, vf_coef=vf_coef, max_grad_norm=limit)
        made = tiny_roles(critic=critic)
        start = flat(made)
        experience = experience_of(made, rollout, settings)
        update(made, experience, settings, make_optimizer(settings, made), seed=0)
        ends.append(flat(made) - start)
    apart = (ends[0] - ends[1]).norm() / ends[0].norm()
    assert (apart > 0.2) == acts
    assert (apart < 0.01) == (not acts)
    assert ("vf_coef" in without_effect(config(critic=critic))) == (not acts)


def test_only_the_two_trained_roles_change(tiny_roles, config, reward_dir, rollout, experience_of):
    extra = {"reward_model_type": "lora", "reward_model": str(reward_dir), "critic": "adapter"}
    settings = config(**extra)
    made = tiny_roles(**extra)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    experience = experience_of(made, rollout, settings)
    update(made, experience, settings, make_optimizer(settings, made), seed=0)
    changed = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(".default." in name or ".critic." in name for name in changed)
    assert {".default." in name for name in changed} == {True, False}


def test_token_index_finds_the_tokens_of_the_rows_in_their_order():
    assert token_index([1, 3, 5, 2], [1, 3]).tolist() == [1, 2, 3, 9, 10]
