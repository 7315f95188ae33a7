"""Stage rm and stage ppo by the command, for every finetuning_type: what is said and written."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastppo import toy
from fastppo.cli import main
from fastppo.run import save

from .test_rm_then_ppo import project, write  # noqa: F401

COMMON = {
    "model_name_or_path": "model",
    "template": "chatml",
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "max_steps": 2,
    "report_to": "none",
}
RM = {**COMMON, "stage": "rm", "dataset": "my_preference_data", "output_dir": "saves/reward"}
PPO = {
    **COMMON,
    "stage": "ppo",
    "dataset": "my_ppo_prompts",
    "output_dir": "saves/ppo",
    "reward_model": "fastppo.toy:vowels",
    "reward_model_type": "function",
    "max_new_tokens": 4,
    "ppo_epochs": 1,
    "save_steps": 1,
}
SFT = {"adapter_name_or_path": "sft"}


@pytest.fixture
def sft(project):  # noqa: F811
    """An SFT adapter with a head and a norm of its own."""
    from fastppo.config import Config
    from fastppo.models import build as roles

    config = Config(**{**PPO, "additional_target": "norm,lm_head", "critic": "shared"})
    made = roles.build(config, torch.device("cpu"))
    with torch.no_grad():
        for parameter in made.trainable_parameters("actor"):
            parameter.add_(0.05)
    save.save_weights(made.model, project / "sft")
    return project


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        pytest.param({"finetuning_type": "full"}, True, marks=pytest.mark.slow),
        pytest.param({"finetuning_type": "full", "bf16": True}, True, marks=pytest.mark.slow),
        pytest.param(
            {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "fp16": True},
            True,
            marks=pytest.mark.slow,
        ),
        pytest.param(SFT, False, marks=pytest.mark.slow),
        ({**SFT, "create_new_adapter": True, "additional_target": "norm"}, False),
        pytest.param({"loraplus_lr_ratio": 4, "use_dora": True}, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_reward_model_of_every_kind(sft, capsys, settings, whole):
    assert main([write(sft / "rm.yaml", {**RM, **settings})]) == 0
    out = capsys.readouterr().out
    what = f"base ({settings['finetuning_type']})" if whole else "adapter"
    assert f"{what} and head train" in out
    folder = sft / "saves" / "reward"
    names = {path.name for path in folder.iterdir()}
    assert {"value_head.safetensors", "fastppo_reward.json", "tokenizer.json"} <= names
    assert ("model.safetensors" in names) == whole
    assert ("adapter_model.safetensors" in names) == (not whole)
    base = AutoModelForCausalLM.from_pretrained(sft / "model").state_dict()
    if whole:
        trained = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert trained.keys() == base.keys()
        assert any(not torch.equal(trained[name].float(), base[name]) for name in base)
        dtypes = {t.dtype for t in load_file(folder / "model.safetensors").values()}
        half = torch.bfloat16 if "bf16" in settings else torch.float16
        assert dtypes == {half if {"bf16", "fp16"} & settings.keys() else torch.float32}
    else:
        model = AutoModelForCausalLM.from_pretrained(sft / "model")
        assert PeftModel.from_pretrained(model, str(folder)).active_adapter == "default"


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"finetuning_type": "full", "critic": "shared"}, marks=pytest.mark.slow),
        pytest.param({"finetuning_type": "freeze", "critic": "model"}, marks=pytest.mark.slow),
        SFT,
        pytest.param(
            {"critic": "model", "critic_finetuning_type": "full", "ref_model": "model"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_a_policy_of_every_kind_prints_its_roles_and_resumes(sft, capsys, settings):
    file = write(sft / "ppo.yaml", {**PPO, **settings})
    assert main([file]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.split()}
    assert rows["reference"] == rows["reward"] == "0"
    assert int(rows["actor"].replace(",", "")) > 0 < int(rows["critic"].replace(",", ""))
    assert ("note: the reference is sft as it is now" in out) == (settings == SFT)
    state = json.loads((sft / "saves" / "ppo" / "trainer_state.json").read_text())
    assert state["log_history"][0]["kl"] == 0.0
    assert main([file, "resume_from_checkpoint=true", "max_steps=3"]) == 0
    assert "resumes after step 1" in capsys.readouterr().out


@pytest.mark.slow  # two runs
def test_a_whole_reward_model_is_reward_and_critic_of_a_policy_that_trains_whole(sft, capsys):
    rm = write(sft / "rm.yaml", {**RM, "finetuning_type": "full"})
    assert main([rm]) == 0
    settings = {"critic": "model", "critic_model": "saves/reward", "finetuning_type": "full"}
    settings |= {"reward_model": "saves/reward", "reward_model_type": "full"}
    settings |= {"critic_finetuning_type": "lora"}
    assert main([write(sft / "ppo.yaml", {**PPO, **settings, "max_steps": 1})]) == 0
    assert "saves/reward + LoRA 'critic' + head" in capsys.readouterr().out


def test_wrong_for_the_model_is_one_line_too(sft, capsys):
    toy.write_model(sft / "tied", tie_word_embeddings=True)
    settings = {"model_name_or_path": "tied", "additional_target": "lm_head"}
    assert main([write(sft / "ppo.yaml", {**PPO, **settings})]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "additional_target: lm_head: this model ties its embeddings" in error
    assert not (sft / "saves" / "ppo").exists()
