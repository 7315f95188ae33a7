"""Settings of the roles that cannot be: one line each, exit code 2, before torch is imported."""

from __future__ import annotations

import time
from typing import Any

import pytest

from .conftest import PPO, RM, write_json
from .test_bad_input import refused, write

FULL = {"finetuning_type": "full", "reward_model_type": "function", "reward_model": "mine:short"}
FREEZE = {**FULL, "finetuning_type": "freeze"}

SETTINGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"finetuning_type": "lor"}, ("'lor' is none of lora, freeze or full", "did you mean lora?")),
    ({"finetuning_type": "full"}, ("reward_model_type: lora needs finetuning_type: lora",)),
    ({"finetuning_type": "freeze"}, ("reward_model_type: lora needs finetuning_type: lora",)),
    ({**FULL, "quantization_bit": 4}, ("quantization_bit: works with finetuning_type: lora only",)),
    ({**FULL, "adapter_name_or_path": "a"}, ("adapter_name_or_path: works with",)),
    ({**FULL, "loraplus_lr_ratio": 16}, ("loraplus_lr_ratio: works with", "leave it out")),
    ({**FREEZE, "freeze_trainable_layers": 0}, ("freeze_trainable_layers: 0 trains nothing",)),
    ({**FREEZE, "freeze_trainable_layers": "two"}, ("freeze_trainable_layers: 'two' is wrong",)),
    ({"loraplus_lr_ratio": 0.5}, ("loraplus_lr_ratio: 0.5 is wrong", "greater than or equal to 1")),
    ({"quantization_bit": 3}, ("quantization_bit: 3 is none of 4 or 8",)),
    ({"quantization_bit": True}, ("quantization_bit: true is wrong",)),
    ({"quantization_type": "nf8"}, ("quantization_type: 'nf8' is none of nf4 or fp4",)),
    (
        {"quantization_bit": 4, "adapter_name_or_path": "reward,reward"},
        ("adapter_name_or_path: a model under quantization_bit takes one adapter", "merge"),
    ),
    (
        {"quantization_bit": 4, "adapter_name_or_path": "reward", "create_new_adapter": True},
        ("create_new_adapter: a quantised base takes no merged adapter",),
    ),
    ({"ref_model_adapters": "reward"}, ("ref_model_adapters: needs ref_model",)),
    ({"ref_model_quantization_bit": 4}, ("ref_model_quantization_bit: needs ref_model",)),
    (
        {"ref_model": "model", "ref_model_adapters": "a,b", "ref_model_quantization_bit": 8},
        ("ref_model_adapters: a model under ref_model_quantization_bit takes one adapter",),
    ),
    ({"critic_model": "model"}, ("critic_model: needs critic: model",)),
    ({"critic_finetuning_type": "full"}, ("critic_finetuning_type: needs critic: model",)),
    ({"critic": "model"}, ("critic: model with LoRA and no critic_model is critic: adapter",)),
    (
        {"critic": "model", "critic_finetuning_type": "freeze", "freeze_trainable_layers": 0},
        ("freeze_trainable_layers: 0 trains nothing",),
    ),
    ({"ref_model": "./absent"}, ("ref_model: no folder ./absent", "owner/name")),
    ({"ref_model": "data"}, ("ref_model: data has no config.json",)),
    ({"ref_model": "reward"}, ("ref_model: reward has no config.json (it holds an adapter)",)),
    ({"critic": "model", "critic_model": "data"}, ("critic_model: data has no config.json",)),
    ({"adapter_name_or_path": "absent"}, ("adapter_name_or_path: no folder absent",)),
    ({"adapter_name_or_path": "reward, absent"}, ("no folder absent", "check the path")),
    ({"adapter_name_or_path": "data"}, ("data has no adapter (adapter_config.json and", "PEFT")),
    (
        {"ref_model": "model", "ref_model_adapters": "data"},
        ("ref_model_adapters: data has no adapter",),
    ),
    (
        {"adapter_name_or_path": "reward", "output_dir": "reward", "overwrite_output_dir": True},
        ("output_dir: is ", "itself; name another"),
    ),
]


@pytest.mark.parametrize(("change", "words"), SETTINGS, ids=lambda value: str(value)[:60])
def test_settings_of_the_roles(project, capsys, change, words):
    refused(write(project, {**PPO, **change}), project, capsys, "run.yaml: ", *words)


def test_an_adapter_whose_configuration_is_no_json(project, capsys):
    (project / "reward" / "adapter_config.json").write_text("{")
    settings = {**RM, "adapter_name_or_path": "reward"}
    words = ("adapter_name_or_path: reward/adapter_config.json cannot be read", "mend or replace")
    refused(write(project, settings), project, capsys, *words)


@pytest.mark.parametrize(
    ("change", "extra"),
    [
        ({"flash_attn": "fa2", "bf16": True}, "flash-attn"),
        ({"quantization_bit": 4}, "quantization"),
        ({"ref_model": "model", "ref_model_quantization_bit": 8}, "quantization"),
    ],
    ids=str,
)
def test_a_package_asked_for_and_absent_is_the_install_line_in_under_a_second(
    project, capsys, monkeypatch, change, extra
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    began = time.perf_counter()
    refused(write(project, {**PPO, **change}), project, capsys, f"pip install 'fastppo[{extra}]'")
    assert time.perf_counter() - began < 1.0


def test_lists_may_be_yaml_lists(project):
    from fastppo.config import config_from_dict

    write_json(project / "x.json", {})
    settings = config_from_dict(
        {**PPO, "adapter_name_or_path": ["a", "b"], "additional_target": ["norm", "lm_head"]}
    )
    assert settings.adapter_name_or_path == "a,b"
    assert settings.additional_target == "norm,lm_head"
