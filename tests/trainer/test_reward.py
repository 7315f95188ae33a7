"""Where a response is scored, and what a reward function may give back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastppo.errors import UserError
from fastppo.reward_function import FunctionReward, call_scores, load_function
from fastppo.reward_head import AdapterReward, append
from fastppo.reward_model import calibrate


@pytest.fixture
def reward(tiny_roles, reward_dir, template):
    made = tiny_roles(reward_model_type="lora", reward_model=str(reward_dir))
    return AdapterReward(made, reward_dir, template, batch_size=4)


def test_12_more_padding_changes_no_score(reward, rollout, template):
    pads = torch.full((4, 7), template.pad_id)
    wider = replace(rollout, input_ids_BT=torch.cat([rollout.input_ids_BT, pads], dim=1))
    assert torch.equal(reward(rollout), reward(wider))


def test_12_the_score_is_of_the_last_real_token(reward, rollout):
    before = reward(rollout)
    changed = rollout.input_ids_BT.clone()
    changed[1, rollout.lengths[1] - 1] = 99
    after = reward(replace(rollout, input_ids_BT=changed))
    assert after[1] != before[1]
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])


def test_12_scores_do_not_depend_on_the_batch_size(reward, rollout):
    together = reward(rollout)
    reward.batch_size = 1
    torch.testing.assert_close(reward(rollout), together, atol=1e-5, rtol=0)


def test_13_ours_are_scored_at_eos_and_llamafactorys_at_its_suffix(reward, rollout, template):
    assert reward.score_at == "eos"
    at_eos = reward(rollout)
    reward.score_at = "suffix"
    at_suffix = reward(rollout)
    reward.score_at = "eos"
    by_hand = reward(append(rollout, list(template.suffix_ids), template.pad_id))
    assert torch.equal(at_suffix, by_hand)
    ended = torch.tensor(rollout.terminated)
    assert (at_suffix != at_eos)[ended].all()
    # A response that was cut off has no end to put a suffix behind.
    torch.testing.assert_close(at_suffix[~ended], at_eos[~ended])


def test_13_a_reward_model_without_our_record_is_llamafactorys(
    tiny_roles, reward_dir, template, tmp_path
):
    made = tiny_roles(reward_model_type="lora", reward_model=str(reward_dir))
    assert AdapterReward(made, tmp_path, template, 4).score_at == "suffix"


def test_35_calibration_gives_mean_0_and_std_1_and_keeps_the_order():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 1)
    hidden = torch.randn(50, 8) * 3 + 1
    before = head(hidden).squeeze(-1).detach()
    calibrate(head, before)
    after = head(hidden).squeeze(-1).detach()
    assert after.mean().abs() < 1e-5
    assert (after.std() - 1).abs() < 1e-5
    assert torch.equal(before.argsort(), after.argsort())


def test_functions_get_the_columns_that_they_ask_for(rollout):
    seen = {}

    def score(prompts, completions, answer):
        seen.update(prompts=prompts, answer=answer)
        return [0.0] * len(completions)

    columns = {"answer": [1, 2, 3, 4], "other": [0, 0, 0, 0]}
    call_scores(score, "reward_model", ["a"] * 4, ["b"] * 4, columns)
    assert seen == {"prompts": ["a"] * 4, "answer": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("given", "message"),
    [([1.0], "gave 1 scores for 2"), ([1.0, float("nan")], "gave nan for the completion 'b2'")],
)
def test_bad_scores_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        call_scores(lambda prompts, completions: given, "reward_model x", ["a", "a"], ["b1", "b2"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vowels", "is not module:function"),
        ("no_such_module_here:f", "cannot import 'no_such_module_here'"),
        ("fastppo.toy:consonants", "has no function 'consonants'"),
    ],
)
def test_functions_that_are_not_there(name, message):
    with pytest.raises(UserError, match=message):
        load_function(name, "reward_model")


def test_function_reward_scores_the_texts(rollout):
    texts = ["aaaa", "abab", "bbbb", ""]
    assert FunctionReward("fastppo.toy:vowels")(replace(rollout, texts=texts)).tolist() == [
        1.0,
        0.5,
        0.0,
        0.0,
    ]
