"""Reward adapters: where a response is scored, and the folders that hold one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fastppo.cli import main
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
    expected = AdapterReward(ours, reward_dir, template, 4)
    if change:
        change(llamafactory_dir)
    theirs = tiny_roles(reward_model_type="lora", reward_model=str(llamafactory_dir))
    loaded = AdapterReward(theirs, llamafactory_dir, template, 4)
    assert (expected.score_at, loaded.score_at) == ("eos", "suffix")
    loaded.score_at = "eos"
    assert torch.equal(loaded(rollout), expected(rollout))


def test_safetensors_are_read_where_both_are(tiny_roles, llamafactory_dir):
    (llamafactory_dir / "value_head.bin").write_bytes(b"not even a pickle")
    tiny_roles(reward_model_type="lora", reward_model=str(llamafactory_dir))


class Evil:
    """A pickle that leaves a file behind where it is opened without care."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def evil_head(folder):
    as_bin(folder)
    torch.save({"v_head.summary.weight": Evil(folder / "owned")}, folder / "value_head.bin")


def evil_adapter(folder):
    as_bin(folder)
    torch.save({"x": Evil(folder / "owned")}, folder / "adapter_model.bin")


def other_head(folder):
    as_bin(folder)
    tensors = {"v_head.summary.weight": torch.zeros(1, 48), "v_head.summary.bias": torch.zeros(1)}
    torch.save(tensors, folder / "value_head.bin")


def two_scores(folder):
    as_bin(folder)
    tensors = {"v_head.summary.weight": torch.zeros(2, 32), "v_head.summary.bias": torch.zeros(2)}
    torch.save(tensors, folder / "value_head.bin")


def no_head(folder):
    as_bin(folder)
    torch.save({"weight": torch.zeros(1)}, folder / "value_head.bin")


def torn_head(folder):
    as_bin(folder)
    head = folder / "value_head.bin"
    head.write_bytes(head.read_bytes()[:100])


def torn_adapter(folder):
    adapter = folder / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:100])


def adapter_of_another_model(folder):
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"] = ["no_such_layer"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def record_without_place(folder):
    (folder / "fastppo_reward.json").write_text('{"score_at": "somewhere"}')


DAMAGE = [
    (evil_head, ("value_head.bin cannot be read",)),
    (evil_adapter, ("the adapter in", "cannot be loaded")),
    (other_head, ("its head is for hidden size 48, the base has 32", "same model")),
    (two_scores, ("value_head.bin holds no head with one score",)),
    (no_head, ("value_head.bin has no v_head.summary.weight and .bias",)),
    (torn_head, ("value_head.bin cannot be read",)),
    (torn_adapter, ("the adapter in", "cannot be loaded")),
    (adapter_of_another_model, ("the adapter in", "cannot be loaded")),
    (record_without_place, ("fastppo_reward.json does not say score_at eos or suffix",)),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE, ids=lambda v: getattr(v, "__name__", ""))
def test_folders_that_are_no_reward_model(
    config, llamafactory_dir, tmp_path, capsys, damage, words
):
    damage(llamafactory_dir)
    settings = config(reward_model=str(llamafactory_dir), reward_model_type="lora")
    (tmp_path / "run.json").write_text(json.dumps(settings.model_dump(exclude_none=True)))
    before = {*tmp_path.rglob("*")}
    assert main([str(tmp_path / "run.json")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastppo-train: error: reward_model")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert {*tmp_path.rglob("*")} == before
    assert not (llamafactory_dir / "owned").exists()
