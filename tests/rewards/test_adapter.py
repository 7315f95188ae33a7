"""Reward adapters: where a response is scored, and the folders that hold one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fastppo.models.batch import Budget
from fastppo.rewards.adapter import AdapterReward, append_suffix
from fastppo.rm.model import calibrate


@pytest.fixture
def reward(tiny_roles, reward_dir, template):
    made = tiny_roles(reward_model_type="lora", reward_model=str(reward_dir))
    return AdapterReward(made, reward_dir, template, Budget(rows=4))


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
    by_hand = reward(append_suffix(rollout, list(template.suffix_ids), template.pad_id))
    assert torch.equal(at_suffix, by_hand)
    ended = torch.tensor(rollout.terminated)
    assert (at_suffix != at_eos)[ended].all()
    # A response that was cut off has no end to put a suffix behind.
    torch.testing.assert_close(at_suffix[~ended], at_eos[~ended])


def test_13_a_reward_model_without_our_record_is_llamafactorys(
    tiny_roles, reward_dir, template, tmp_path
):
    made = tiny_roles(reward_model_type="lora", reward_model=str(reward_dir))
    assert AdapterReward(made, tmp_path, template, Budget(rows=4)).score_at == "suffix"


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


@pytest.fixture
def llamafactory_dir(reward_dir, tmp_path):
    """The files that LLaMA-Factory's stage rm leaves, and no record of ours."""
    folder = tmp_path / "lf"
    shutil.copytree(reward_dir, folder)
    (folder / "fastppo_reward.json").unlink()
    settings = json.loads((folder / "adapter_config.json").read_text())
    # What a PEFT of its time wrote, a new key of which another PEFT may not know.
    for name in ("qalora_group_size", "use_qalora", "corda_config", "eva_config"):
        settings.pop(name, None)
    settings |= {"inference_mode": True, "task_type": "CAUSAL_LM", "revision": None}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "training_args.bin").write_bytes(b"a pickle that nobody opens")
    (folder / "README.md").write_text("x")
    return folder


def as_bin(folder) -> None:
    """`save_safetensors: false`: torch's files, adapter and head."""
    for name in ("adapter_model", "value_head"):
        tensors = load_file(folder / f"{name}.safetensors")
        torch.save(tensors, folder / f"{name}.bin")
        (folder / f"{name}.safetensors").unlink()


@pytest.mark.parametrize("change", [None, as_bin], ids=["safetensors", "bin"])
def test_llamafactorys_folder_loads_and_says_the_same(
    tiny_roles, reward_dir, llamafactory_dir, template, rollout, change
):
    ours = tiny_roles(reward_model_type="lora", reward_model=str(reward_dir))
    expected = AdapterReward(ours, reward_dir, template, Budget(rows=4))
    if change:
        change(llamafactory_dir)
    theirs = tiny_roles(reward_model_type="lora", reward_model=str(llamafactory_dir))
    loaded = AdapterReward(theirs, llamafactory_dir, template, Budget(rows=4))
    assert (expected.score_at, loaded.score_at) == ("eos", "suffix")
    loaded.score_at = "eos"
    assert torch.equal(loaded(rollout), expected(rollout))


def test_safetensors_are_read_where_both_are(tiny_roles, llamafactory_dir):
    (llamafactory_dir / "value_head.bin").write_bytes(b"not even a pickle")
    tiny_roles(reward_model_type="lora", reward_model=str(llamafactory_dir))
