"""PPOConfig: every name of TrainingArguments and of TRL is mapped, harmless or refused."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
from transformers import HfArgumentParser, TrainingArguments

from fastppo import PPOConfig
from fastppo.config import Config
from fastppo.config.elsewhere import IGNORED
from fastppo.config.elsewhere import REFUSED as NOT_SUPPORTED
from fastppo.errors import UserError
from fastppo.trainer.arguments import ELSEWHERE, HERE, INHERITED, OWN, class_of
from fastppo.trainer.names import HARMLESS, NAMES, REFUSED, RENAMED, SAME, TABLES


def make(**given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PPOConfig(output_dir="out", use_cpu=True, **given)


def keys(**given):
    found = make(**given).keys()
    return {name: value for name, value in found.items() if name not in ("output_dir", "use_cpu")}


def test_every_field_of_training_arguments_is_in_exactly_one_class():
    for name in INHERITED:
        tables = [name in Config.model_fields, name in IGNORED, name in NOT_SUPPORTED]
        assert name in HERE or tables.count(True) == 1, name
        assert class_of(name) in ("mapped", "harmless", "refused")


def test_it_is_training_arguments_and_the_defaults_are_those_of_the_yaml():
    args = make()
    assert isinstance(args, TrainingArguments)
    assert keys() == {}
    for name, field in OWN.items():
        if getattr(args, name) is not None:
            assert getattr(args, name) == field.default, name
    assert (args.ppo_epochs, args.gamma, args.cliprange_value) == (4, 1.0, 0.2)


def test_every_key_of_stage_ppo_is_a_field_or_an_argument():
    fields = {field.name for field in dataclasses.fields(PPOConfig)}
    assert set(ELSEWHERE) <= set(Config.model_fields)
    assert fields >= {*OWN, *NAMES, *INHERITED}
    assert set(SAME) <= fields
    assert not set(NAMES) & set(SAME)
    assert sum(map(len, TABLES)) == len(NAMES), "a name in two tables"


def test_a_field_of_transformers_means_what_its_key_means():
    assert keys(
        learning_rate=1e-4,
        per_device_train_batch_size=4,
        save_steps=7,
        eval_strategy="steps",
        eval_steps=3,
        report_to=["tensorboard"],
        warmup_steps=2,
        lr_scheduler_type="cosine",
        optim="adafactor",
        max_grad_norm=None,
        bf16=True,
    ) == {
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 4,
        "save_steps": 7,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "report_to": "tensorboard",
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "optim": "adafactor",
        "max_grad_norm": 0.0,  # null is no clip in TRL 0.9.6
        "bf16": True,
    }
    assert keys(gradient_checkpointing=False) == {"disable_gradient_checkpointing": True}
    assert keys(gradient_checkpointing=True) == {"disable_gradient_checkpointing": False}
    assert keys() == {}
    assert keys(cliprange_value=None) == {"cliprange_value": None}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"deepspeed": "zero3.json"}, "deepspeed: not supported; fastppo has no DeepSpeed"),
        ({"hub_token": "hf_x"}, "hub_token: not supported; set HF_TOKEN in the environment"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: not supported"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: not supported"),
        ({"tracker_kwargs": {"wandb": {}}}, "tracker_kwargs: not supported; use report_to"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: not supported"),
        ({"stop_token": "pad"}, "stop_token: 'pad' is not eos"),
        ({"kl_estimator": "k2"}, "kl_estimator: 'k2' is neither k1 nor k3"),
    ],
)
def test_what_would_change_a_run_and_is_not_here_is_refused_by_name(given, line):
    with pytest.raises(UserError, match=line):
        make(**given)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"response_length": 53, "max_new_tokens": 64},
            "response_length means max_new_tokens: 53, and max_new_tokens: 64 is given too",
        ),
        ({"num_ppo_epochs": 1, "ppo_epochs": 2}, "num_ppo_epochs means ppo_epochs: 1, and"),
        ({"kl_coef": 0.1, "adap_kl_ctrl": True}, "kl_coef means adap_kl_ctrl: False, and"),
        ({"steps": 80, "total_episodes": 160}, r"steps: 10 \(which is max_steps: 10\)|steps"),
        ({"mini_batch_size": 2, "forward_batch_size": 4}, "are one setting; keep one"),
        ({"batch_size": 12}, "batch_size: 12 is no multiple of the 8 responses"),
        ({"num_mini_batches": 3}, "num_mini_batches: 3 does not divide the 8 responses"),
        ({"num_mini_batches": 2, "batch_size": 16}, "batch_size: 16 disagrees with"),
        (
            {"gradient_checkpointing": True, "activation_offloading": "none"},
            "gradient_checkpointing: True disagrees with activation_offloading: none",
        ),
    ],
)
def test_two_names_that_disagree_are_an_error(given, line):
    with pytest.raises(UserError, match=line):
        make(**given)


def test_two_names_that_agree_are_none():
    assert keys(response_length=64, max_new_tokens=64) == {"max_new_tokens": 64}


def test_each_name_of_trl_gets_a_line_that_says_what_it_became():
    with pytest.warns(UserWarning) as caught:  # noqa: PT030 - the lines are compared below
        PPOConfig(output_dir="out", use_cpu=True, response_length=53, kl_coef=0.05, task_name="x")
    lines = sorted(str(each.message) for each in caught if "TRL" in str(each.message))
    assert lines == [
        "PPOConfig: kl_coef is TRL's name, and read as init_kl_coef: 0.05 with adap_kl_ctrl: False",
        "PPOConfig: response_length is TRL's name, and read as max_new_tokens: 53",
        "PPOConfig: task_name is TRL's, and does nothing here: no part of training, in TRL too",
    ]


def test_the_quickstart_of_trl_0_9_6_in_our_keys():
    # 128 responses a step in optimiser steps of 16 x 2: 4 of them an epoch; 20000 / 128 = 156.25.
    found = keys(
        steps=20000,
        learning_rate=1.41e-5,
        adap_kl_ctrl=True,
        init_kl_coef=0.2,
        target=6,
        horizon=10000,
        batch_size=128,
        mini_batch_size=16,
        gradient_accumulation_steps=2,
        ppo_epochs=4,
        whiten_rewards=True,
        log_with="tensorboard",
        remove_unused_columns=False,
    )
    assert found == {
        "learning_rate": 1.41e-5,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 16,
        "ppo_buffer_size": 4,
        "max_steps": 157,
        "ppo_whiten_rewards": True,
        "report_to": "tensorboard",
    }


def test_the_quickstart_of_trl_1_in_our_keys():
    # 64 x 1 responses a step; 10000 / 64 = 156.25.
    found = keys(
        learning_rate=3e-6,
        num_ppo_epochs=1,
        num_mini_batches=1,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        total_episodes=10000,
        missing_eos_penalty=1.0,
        stop_token="eos",
        kl_coef=0.05,
        response_length=53,
        temperature=0.7,
        local_rollout_forward_batch_size=64,
    )
    assert found == {
        "learning_rate": 3e-6,
        "ppo_epochs": 1,
        "per_device_train_batch_size": 64,
        "max_steps": 157,
        "missing_eos_penalty": 1.0,
        "init_kl_coef": 0.05,
        "adap_kl_ctrl": False,
        "max_new_tokens": 53,
        "temperature": 0.7,
        "generation_batch": 64,
    }


@pytest.mark.parametrize(
    ("rows", "accumulated", "parts"), [(8, 2, 2), (8, 1, 2), (6, 1, 4), (4, 6, 3)]
)
def test_mini_batches_split_the_rollout_and_leave_its_size(rows, accumulated, parts):
    given = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
    if rows * accumulated % parts:
        with pytest.raises(UserError, match="does not divide"):
            make(**given, num_mini_batches=parts)
        return
    found = {"gradient_accumulation_steps": 1, **keys(**given, num_mini_batches=parts)}
    micro = found.get("per_device_train_batch_size", 8)
    assert micro <= rows
    assert micro * found["gradient_accumulation_steps"] * parts == rows * accumulated
    assert found["ppo_buffer_size"] == parts


def test_every_name_of_trl_is_accepted_with_its_own_default_or_refused_with_a_cure():
    for name, entry in NAMES.items():
        if name in RENAMED or name in HARMLESS:
            value = (
                1
                if name == "world_size"
                else {int: 8, float: 6.0, bool: True, str: "none"}[entry.kind]
            )
            if name in HARMLESS:
                assert keys(**{name: value}) == {}, name
            elif RENAMED[name].here in Config.model_fields:
                found = make(**{name: value})
                assert found._keys[RENAMED[name].here] == value, name
        if name in REFUSED:
            assert keys(**{name: entry.default or None}) == {}


def test_arguments_come_from_a_command_line_and_can_be_copied():
    (args,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(
        [
            *("--output_dir", "out", "--use_cpu", "--max_new_tokens", "7"),
            *("--gamma", "0.9", "--reward_weights", "1", "2"),
        ]
    )
    assert args.keys() == {
        "output_dir": "out",
        "use_cpu": True,
        "max_new_tokens": 7,
        "gamma": 0.9,
        "reward_weights": [1.0, 2.0],
    }
    kept = dataclasses.replace(args, learning_rate=1e-3)
    assert kept.keys() == {**args.keys(), "learning_rate": 1e-3, "disable_tqdm": False}


def test_trl_s_model_arguments_can_be_parsed_beside_it():
    # Names of trl.ModelConfig and ScriptArguments, which scripts parse together with PPOConfig.
    names = {"model_name_or_path", "model_revision", "dtype", "attn_implementation"}
    names |= {"trust_remote_code", "use_peft", "lora_r", "lora_alpha", "lora_dropout"}
    names |= {"lora_target_modules", "lora_modules_to_save", "lora_task_type", "use_rslora"}
    names |= {"use_dora", "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type"}
    names |= {"dataset_name", "dataset_config", "dataset_train_split", "dataset_streaming"}
    assert not {field.name for field in dataclasses.fields(PPOConfig)} & names
