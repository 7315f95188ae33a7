"""Micro-batches by tokens: which rows share one, packed and padded alike, nothing leaks."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from fastppo.config import config_from_dict
from fastppo.config.memory import longest_sequence
from fastppo.errors import UserError
from fastppo.memory.budgets import Budgets
from fastppo.models.batch import (
    PASS_TOKENS,
    Budget,
    Order,
    batches,
    check_packing,
    make_batch,
    padded_tokens,
    partition,
)
from fastppo.ppo.optimizer import make_optimizer
from fastppo.ppo.score import first_pass_tokens, score
from fastppo.ppo.update import update
from fastppo.types import Kept
from tests.gradients import gradient
from tests.tiers import slow_unless

SPLITS = {
    "1 row": Budget(rows=1),
    "2 rows": Budget(rows=2),
    "4 rows": Budget(rows=4),
    "packed": Budget(packed=True),
    "packed in two": Budget(rows=2, packed=True),
    "by tokens": Budget(tokens=60),
}


def cost(lengths, parts, packed=False):
    """What `partition` makes least."""
    sizes = [[lengths[row] for row in part] for part in parts]
    return sum(PASS_TOKENS + (sum(s) if packed else len(s) * max(s)) for s in sizes)


def test_rows_of_similar_length_share_a_micro_batch_within_the_budget():
    lengths = [10, 200, 12, 190, 11, 500]
    parts = partition(lengths, range(6), Budget(tokens=450))
    assert parts == [[0, 4, 2], [3, 1], [5]]  # 500 is over the budget, and runs alone


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [40, 150, 400, None])
def test_no_other_cut_in_order_of_length_costs_less(tokens, packed):
    """Against every one of the 2^7 ways to cut eight rows."""
    lengths = [30, 9, 110, 31, 8, 64, 20, 90]
    budget = Budget(tokens=tokens, packed=packed)
    ordered = sorted(range(8), key=lambda row: lengths[row])
    best = math.inf
    for places in range(2**7):
        cuts = [0, *(i + 1 for i in range(7) if places >> i & 1), 8]
        parts = [ordered[a:b] for a, b in pairwise(cuts)]
        sizes = [[lengths[row] for row in part] for part in parts]
        took = [sum(s) if packed else len(s) * max(s) for s in sizes]
        most = math.inf if tokens is None else tokens
        if all(len(s) == 1 or t <= most for s, t in zip(sizes, took, strict=True)):
            best = min(best, cost(lengths, parts, packed))
    found = partition(lengths, range(8), budget)
    assert sorted(row for part in found for row in part) == list(range(8))
    assert cost(lengths, found, packed) == best


def test_padding_costs_less_than_the_pass_it_saves():
    """The default may not be slower: rows join where they add less padding than PASS_TOKENS."""
    near, far = [100, 100 + PASS_TOKENS - 1], [100, 100 + PASS_TOKENS + 1]
    assert len(partition(near, range(2), Budget())) == 1
    assert len(partition(far, range(2), Budget())) == 2


def test_the_default_budget_is_what_was_planned_for_the_longest_rows(config):
    settings = config(per_device_train_batch_size=3, cutoff_len=100, max_new_tokens=28)
    assert Budget.of(settings) == Budget(tokens=3 * 128)
    own = config(ppo_max_token_len_per_gpu=77, log_prob_max_token_len_per_gpu=99, padding_free=True)
    assert Budget.of(own) == Budget(tokens=77, packed=True)
    assert Budget.of(own, scoring=True) == Budget(tokens=99, packed=True)


@pytest.fixture
def doubled(tiny_roles, rollout, experience_of, config):
    """Roles and an experience in float64, off the policy, so that no term is 0."""

    def make(**changes):
        settings = config(**changes)
        made = tiny_roles(**changes)
        made.model.double()
        made.critic_head.double()
        experience = experience_of(made, rollout, settings)
        logprob_N = experience.scored.logprob_N
        moved = logprob_N - torch.linspace(-0.5, 0.5, logprob_N.numel(), dtype=torch.float64)
        scored = replace(experience.scored, logprob_N=moved)
        advantage_N = torch.linspace(-1.0, 2.0, logprob_N.numel(), dtype=torch.float64)
        return made, replace(experience, scored=scored, advantage_N=advantage_N), settings

    return make


@pytest.mark.parametrize("critic", ["adapter", "shared"])
def test_one_gradient_for_micro_batches_of_1_2_4_packed_and_padded(doubled, critic):
    parts = doubled(critic=critic)
    wanted = gradient(*parts, SPLITS["4 rows"])
    size = wanted.abs().max()
    assert size > 1e-4
    for name, budget in SPLITS.items():
        found = gradient(*parts, budget)
        # Entries near 0 are sums of larger terms: rounding is held against those.
        torch.testing.assert_close(
            found, wanted, rtol=1e-10, atol=1e-12 * size.item(), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("flash_attn", ["sdpa", "disabled"])
def test_a_packed_sequence_does_not_notice_its_neighbour(tiny_roles, rollout, flash_attn):
    made = tiny_roles(flash_attn=flash_attn)
    first = rollout.lengths[1]
    for role in ("actor", "reference", "critic"):
        seen = []
        for token in (70, 99):
            ids_BT = rollout.input_ids_BT.clone()
            ids_BT[1, :first] = token
            batch = make_batch(replace(rollout, input_ids_BT=ids_BT), [1, 2], packed=True)
            with made.use(role), torch.no_grad():
                seen.append(made.hidden(**batch.inputs)[0])
        assert not torch.equal(seen[0][:first], seen[1][:first])
        assert torch.equal(seen[0][first:], seen[1][first:])


def test_a_packed_sequence_is_what_it_is_alone(tiny_roles, rollout):
    made = tiny_roles()
    with made.use("actor"), torch.no_grad():
        packed = make_batch(rollout, range(4), packed=True)
        together = made.hidden(**packed.inputs)
        pieces = []
        for row in range(4):
            pieces.append(made.hidden(**make_batch(rollout, [row]).inputs)[0])
    torch.testing.assert_close(together[0], torch.cat(pieces), atol=1e-5, rtol=1e-5)
    assert torch.equal(packed.last(together), together[0, packed.last_B])
    torch.testing.assert_close(packed.last(together)[2], pieces[2][-1], atol=1e-5, rtol=1e-5)


def test_attention_without_borders_is_refused(tiny_roles, rollout, monkeypatch):
    made = tiny_roles()
    check_packing(made, rollout.prompts[1].ids)
    seen = made.hidden

    def borderless(input_ids_BT, positions_BT=None):
        return seen(input_ids_BT)

    monkeypatch.setattr(made, "hidden", borderless)
    with pytest.raises(UserError, match="padding_free: with sdpa attention this model"):
        check_packing(made, rollout.prompts[1].ids)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("exact_kl", [False, True])
def test_scores_are_in_the_order_of_the_rollout_however_it_is_split(
    tiny_roles, rollout, vowels, name, exact_kl
):
    made = tiny_roles()
    settings = {"temperature": 0.9, "exact_kl": exact_kl}
    wanted = score(made, rollout, vowels(rollout), budget=Budget(rows=4), **settings)
    found = score(made, rollout, vowels(rollout), budget=SPLITS[name], **settings)
    names = ["logprob_N", "ref_logprob_N", "entropy_N", "value_N", "final_value_B"]
    for field in [*names, *(["exact_kl_N"] if exact_kl else [])]:
        torch.testing.assert_close(
            getattr(found, field), getattr(wanted, field), atol=2e-5, rtol=2e-5
        )


def test_order_puts_rows_and_tokens_back(rollout):
    made = batches(rollout, range(4), Budget(rows=1))
    order = Order.of(rollout, made)
    rows = [torch.tensor([float(batch.rows[0])]) for batch in made]
    assert order.rows(rows).tolist() == [0.0, 1.0, 2.0, 3.0]
    tokens = order.tokens([batch.token_N for batch in made])
    assert tokens.tolist() == make_batch(rollout, range(4)).token_N.tolist()


@pytest.mark.parametrize("budget", [Budget(), Budget(rows=2), Budget(packed=True)])
@pytest.mark.parametrize(
    ("checkpointing", "critic"),
    slow_unless(
        lambda checkpointing, critic: checkpointing == (critic == "adapter"),
        product([False, True], ["adapter", "shared"]),
    ),
)
def test_the_first_pass_that_scoring_kept_is_the_update_to_the_bit(
    tiny_roles, config, rollout, experience_of, vowels, critic, checkpointing, budget
):
    """And it saves those forwards: the actor's, and where there is room a separate critic's."""
    settings = config(critic=critic, disable_gradient_checkpointing=not checkpointing)
    made, separate, results = batches(rollout, range(4), budget), critic == "adapter", {}
    padded = sum(padded_tokens(rollout, batch.rows, budget) for batch in made)
    for keep in (0, padded - 1, padded, 2 * padded):
        roles = tiny_roles(critic=critic, disable_gradient_checkpointing=not checkpointing)
        experience = experience_of(roles, rollout, settings, budget=budget, keep=keep)
        assert (experience.scored.kept is not None) == (keep >= padded)
        count = []
        handle = roles.trunk.norm.register_forward_hook(lambda *_, count=count: count.append(1))
        budgets = replace(Budgets.of(settings), update=budget)
        optimizer = make_optimizer(settings, roles)
        learned = update(roles, experience, settings, optimizer, seed=0, budgets=budgets)
        handle.remove()
        both = [*roles.trainable_parameters("actor"), *roles.trainable_parameters("critic")]
        weights = torch.cat([p.detach().flatten() for p in both])
        results[keep] = (weights, len(count))
        assert learned["ratio_first_pass"] == 0.0
        assert experience.scored.kept is None or not experience.scored.kept.hidden
    plain, forwards = results[0]
    saved = {padded - 1: 0, padded: len(made), 2 * padded: len(made) * (1 + separate)}
    for keep, fewer in saved.items():
        assert torch.equal(results[keep][0], plain)
        assert forwards - results[keep][1] == fewer


def test_no_more_is_kept_than_a_micro_batch_of_the_update_may_have(config):
    """And nothing where the update would run other micro-batches than scoring."""
    settings = config(ppo_max_token_len_per_gpu=5000)
    longest, budgets = longest_sequence(settings), Budgets.of(settings)
    assert first_pass_tokens(settings, budgets, rows=1) == longest
    assert first_pass_tokens(settings, budgets, rows=1000) == 5000
    budgets = Budgets(update=Budget(rows=3), scoring=Budget(rows=3))
    assert first_pass_tokens(settings, budgets, rows=8) == 3 * longest
    for changes in ({"ppo_buffer_size": 2}, {"log_prob_max_token_len_per_gpu": 4000}):
        other = config(**changes)
        assert first_pass_tokens(other, Budgets.of(other), rows=4) == 0


def test_what_is_kept_of_other_micro_batches_is_released():
    x = torch.zeros(2)
    kept = Kept({("actor", (0, 1)): x, ("actor", (2, 3)): x, ("critic", (0, 1)): x})
    assert kept.among(8).take("actor", [10, 11]) is x
    kept.retain([[0, 1], [2]])
    assert set(kept.hidden) == {("actor", (0, 1)), ("critic", (0, 1))}
    assert kept.take("actor", [0, 1]) is x
    assert kept.take("actor", [0, 1]) is None
    assert set(kept.hidden) == {("critic", (0, 1))}


def test_an_update_in_other_micro_batches_than_scoring_uses_nothing_that_was_kept(
    tiny_roles, config, rollout, experience_of
):
    """And has released it before its first forward."""
    settings, made = config(critic="adapter"), tiny_roles(critic="adapter")
    experience = experience_of(made, rollout, settings, budget=Budget(), keep=10**6)
    kept, seen = experience.scored.kept, []
    assert kept is not None
    made.trunk.norm.register_forward_hook(lambda *_: seen.append(len(kept.hidden)))
    budgets = replace(Budgets.of(settings), update=Budget(rows=2))
    update(made, experience, settings, make_optimizer(settings, made), seed=0, budgets=budgets)
    assert seen
    assert not any(seen)


def test_names_of_other_trainers_are_errors_that_name_the_key():
    base = {"stage": "ppo", "model_name_or_path": "x", "dataset": "x", "output_dir": "x"}
    for name, ours in (
        ("use_dynamic_bsz", "ppo_max_token_len_per_gpu"),
        ("forward_batch_size", "ppo_micro_batch_size_per_gpu"),
    ):
        with pytest.raises(UserError, match=ours):
            config_from_dict({**base, name: 1})
    with pytest.raises(UserError, match="packing: not supported; use padding_free"):
        config_from_dict({**base, "packing": True})
