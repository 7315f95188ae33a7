"""Reward models of every maker score here as with their own library; docs/rewards.md lists them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastppo.rewards.reward import make_reward
from tests.rewards.matrix import PAGE, ROWS, Places, written
from tests.tiny import PROMPTS

ANSWERS = ["aeiou", "Yes, of course it is.", "x", "That is what it was then."]


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_scores_are_those_of_its_own_library(
    row, model_dir, reward_dir, tmp_path, tiny_roles, config, template, tokenizer, lay_out
):
    keys, own = row.write(Places(model_dir, reward_dir, tmp_path))
    rollout = lay_out(PROMPTS, [template.encode_response(text) for text in ANSWERS])
    rollout = replace(rollout, texts=ANSWERS)
    settings = config(**keys)
    roles = tiny_roles(stirred=False, **keys)
    reward = make_reward(settings, roles, template, tokenizer, rollout.prompts)
    score_B, _ = reward(rollout)
    wanted = own([(p.messages, t) for p, t in zip(rollout.prompts, ANSWERS, strict=True)])
    torch.testing.assert_close(score_B, wanted.float(), atol=2e-5, rtol=2e-5)
    assert wanted.std() > 0.01  # or equality would say little


def test_the_page_has_the_matrix():
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page
    assert all(row.what in page for row in ROWS)
