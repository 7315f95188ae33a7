"""Sampling: positions, stop tokens, masks, temperature."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from fastppo.models.batch import make_batch
from fastppo.ppo.rollout import make_rollout, sample
from fastppo.ppo.row_batches import response_length, truncate_at_stop
from fastppo.ppo.sampling import Sampling
from fastppo.ppo.score import token_scores
from fastppo.types import Prompt

GREEDY = Sampling(max_new_tokens=8, do_sample=False)


def ask(template, text):
    return Prompt(template.encode_prompt([{"role": "user", "content": text}], ""), text)


def test_01_left_padding_changes_no_greedy_token(tiny_roles, template, tokenizer):
    made = tiny_roles()
    short, long = ask(template, "Hi"), ask(template, "Tell me of the sea and of bread, slowly.")
    kwargs = {"sampling": GREEDY, "template": template, "tokenizer": tokenizer, "seed": 0}
    alone = sample(made, [short], **kwargs)
    beside = sample(made, [short, long], **kwargs)
    ids_alone = alone.input_ids_BT[0, : alone.lengths[0]]
    assert torch.equal(ids_alone, beside.input_ids_BT[0, : beside.lengths[0]])


def test_02_padding_moves_no_position_of_the_scored_row(tiny_roles, rollout):
    made = tiny_roles()
    for row in range(4):
        alone = make_batch(rollout, [row])
        together = make_batch(rollout, range(4))
        hidden = made.hidden(alone.input_ids_BT, alone.mask_BT)
        padded = made.hidden(together.input_ids_BT, together.mask_BT)[row, : hidden.shape[1]]
        torch.testing.assert_close(hidden[0], padded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([5, 6, 2, 2, 2], (3, True)),  # pad == EOS: exactly one EOS is part of the response
        ([2, 2, 2, 2, 2], (1, True)),
        ([5, 6, 7, 8, 9], (5, False)),
        ([5, 9, 2, 0, 0], (2, True)),  # the first of several stop tokens counts
    ],
)
def test_03_eos_stays_in_the_mask_even_where_it_is_the_pad(row, expected):
    stops = (2,) if expected != (2, True) else (2, 9)
    assert response_length(row, stops) == expected


@pytest.mark.parametrize("stop", [11, 12])  # as llama3 has <|eot_id|> and <|eom_id|>
def test_41_nothing_behind_any_stop_token_is_scored_or_learned(tokenizer, stop):
    """Neither the text that rewards see nor the tokens that train go past it, whichever it is."""
    template = SimpleNamespace(stop_ids=(11, 12), pad_id=0)
    response_BR = torch.tensor([[70, 71, stop, 80, 81], [70, 71, 72, 73, stop]])
    prompts = [Prompt([9], ""), Prompt([9, 9], "")]
    answers = truncate_at_stop(response_BR, torch.zeros(2, 5), template.stop_ids)
    rollout = make_rollout(prompts, answers, template, tokenizer, response_BR.device)
    assert rollout.response_lengths == [3, 5]
    assert rollout.terminated == [True, True]
    assert rollout.texts[0] == tokenizer.decode([70, 71, stop], skip_special_tokens=True).strip()
    assert not (rollout.input_ids_BT[0] == 80).any()
    batch = make_batch(rollout, [0, 1])
    assert batch.token_N.tolist() == [70, 71, stop, 70, 71, 72, 73, stop]


def test_04_mask_has_eos_and_neither_prompt_nor_pad(rollout, template):
    batch = make_batch(rollout, range(4))
    # A token is predicted one position before it stands.
    responses = [
        [template.eos_id],
        [70, 71, 72],
        [80, 81, 82, 83, template.eos_id],
        [90, template.eos_id],
    ]
    assert batch.token_N.tolist() == [token for ids in responses for token in ids]
    assert batch.packing.offsets.tolist() == [0, 1, 4, 9, 11]


def test_04_pads_and_prompts_do_not_reach_the_log_probs(tiny_roles, rollout):
    made = tiny_roles()
    batch = make_batch(rollout, range(4))
    before = token_scores(made, made.hidden(batch.input_ids_BT, batch.mask_BT), batch, 1.0)
    other = batch.input_ids_BT.masked_fill(batch.mask_BT == 0, 33)
    after = token_scores(made, made.hidden(other, batch.mask_BT), batch, 1.0)
    torch.testing.assert_close(before.logprob_N, after.logprob_N, atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_06_log_probs_use_the_sampling_temperature(tiny_roles, template, tokenizer, temperature):
    made = tiny_roles()
    prompts = [ask(template, text) for text in ("Hi", "What is rain?")]
    rollout = sample(
        made,
        prompts,
        sampling=Sampling(max_new_tokens=8, temperature=temperature),
        template=template,
        tokenizer=tokenizer,
        seed=1,
    )
    batch = make_batch(rollout, range(2))
    hidden = made.hidden(batch.input_ids_BT, batch.mask_BT)
    again = token_scores(made, hidden, batch, temperature).logprob_N
    torch.testing.assert_close(again, rollout.sampler_logprob_N, atol=1e-4, rtol=0)
    elsewhere = token_scores(made, hidden, batch, temperature * 1.5).logprob_N
    assert (elsewhere - rollout.sampler_logprob_N).abs().max() > 1e-3


def test_07_truncated_sampling_shows_as_a_gap(tiny_roles, template, tokenizer):
    made = tiny_roles()
    sampling = Sampling(max_new_tokens=8, top_k=5)
    assert sampling.truncates == ["top_k"]
    rollout = sample(
        made,
        [ask(template, "Hi")],
        sampling=sampling,
        template=template,
        tokenizer=tokenizer,
        seed=1,
    )
    batch = make_batch(rollout, [0])
    again = token_scores(made, made.hidden(batch.input_ids_BT, batch.mask_BT), batch, 1.0).logprob_N
    # Renormalised over 5 of 259 tokens, each becomes likelier.
    assert (rollout.sampler_logprob_N > again).all()


def test_07_the_models_own_generation_config_is_not_used(tiny_roles, template, tokenizer):
    made = tiny_roles()
    kwargs = {
        "sampling": Sampling(max_new_tokens=8),
        "template": template,
        "tokenizer": tokenizer,
        "seed": 3,
    }
    plain = sample(made, [ask(template, "Hi")], **kwargs)
    made.base.generation_config = GenerationConfig(
        repetition_penalty=1.9, top_k=2, temperature=0.1, do_sample=True, eos_token_id=7
    )
    dressed = sample(made, [ask(template, "Hi")], **kwargs)
    assert torch.equal(plain.input_ids_BT, dressed.input_ids_BT)
    assert made.base.generation_config.top_k == 2  # and it is put back


def test_same_seed_same_responses_whatever_ran_before(tiny_roles, template, tokenizer):
    made = tiny_roles()
    kwargs = {"sampling": Sampling(max_new_tokens=8), "template": template, "tokenizer": tokenizer}
    first = sample(made, [ask(template, "Hi")], seed=1, **kwargs)
    torch.rand(17)
    state = torch.get_rng_state()
    again = sample(made, [ask(template, "Hi")], seed=1, **kwargs)
    assert torch.equal(first.input_ids_BT, again.input_ids_BT)
    assert torch.equal(state, torch.get_rng_state())  # and it leaves the caller's generator alone
    other = sample(made, [ask(template, "Hi")], seed=2, **kwargs)
    assert first.texts != other.texts
