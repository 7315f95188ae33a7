"""Rewards that are wrong in the YAML or on disk: one line, exit code 2, torch not imported."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastppo.cli import main

from .conftest import PPO, RM, write_head
from .test_bad_input import refused, write

URL = "http://127.0.0.1:9/score"
KEYS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"reward_model_type": "loar"}, ("'loar' is none of lora, full, api, function", "mean lora?")),
    ({"reward_model_type": "oft"}, ("'oft' is none of", "choose one of them")),
    ({"reward_model_type": ""}, ("reward_model_type: '' is none of",)),
    ({"reward_model_type": ["lora", "lora"]}, ("2 types for 1 rewards", "one for all")),
    ({"reward_model": "reward, reward"}, ()),
    ({"reward_model": "reward,,reward"}, ("reward_model: has nothing between two commas",)),
    ({"reward_model": ["reward", 7]}, ("no folder 7",)),
    ({"reward_model": {"a": 1}}, ("reward_model: {'a': 1} is wrong", "string")),
    ({"reward_weights": [1, 2]}, ("reward_weights: 2 weights for 1 rewards", "one for each")),
    ({"reward_weights": "much"}, ("reward_weights: 'much' is wrong", "number")),
    ({"reward_weights": [float("nan")]}, ("reward_weights: nan is wrong", "finite")),
    ({"reward_weights": float("inf")}, ("reward_weights: inf is wrong", "finite")),
    ({"reward_weights": True}, ("reward_weights: true is wrong",)),
    ({"reward_weights": []}, ("reward_weights: 0 weights for 1 rewards",)),
    ({"reward_model_adapters": "reward"}, ("reward_model_adapters: is for the one reward",)),
    ({"reward_model_quantization_bit": 4}, ("_bit: is for the one reward of reward_model_type",)),
    ({"reward_model_quantization_bit": 5}, ("reward_model_quantization_bit: 5 is none of 4 or 8",)),
    ({"reward_api_timeout": 0}, ("reward_api_timeout: 0 is wrong", "greater than 0")),
    ({"reward_api_timeout": "soon"}, ("reward_api_timeout: 'soon' is wrong",)),
    ({"reward_api_timeout": float("inf")}, ("reward_api_timeout: inf is wrong",)),
    ({"reward_api_retries": -1}, ("reward_api_retries: -1 is wrong",)),
    ({"reward_api_retries": 1.5}, ("reward_api_retries: 1.5 is wrong", "integer")),
    ({"reward_api_retris": 1}, ("unknown key", "did you mean 'reward_api_retries'?")),
]
URLS = [
    ("reward", ("'reward' is no http(s) URL", "http://127.0.0.1:8000")),
    ("ftp://host/x", ("is no http(s) URL",)),
    ("file:///etc/passwd", ("is no http(s) URL",)),
    ("http://", ("is no http(s) URL",)),
    ("127.0.0.1:8000/score", ("is no http(s) URL",)),
    ("http://host:port/", ("this URL cannot be read",)),
    ("http://host:99999/", ("this URL cannot be read",)),
    ("http://[::1/", ("this URL cannot be read",)),
    ("http://host/a b", ("characters that a URL cannot have",)),
    ("http://host/分", ("characters that a URL cannot have",)),
    ("http://host/\nX: y", ("characters that a URL cannot have",)),
]
FUNCTIONS = ["reward", "rewards.py:f", "./rewards:f", "a:b:c", "mine:", ":f", "mine:f()", "a b:c"]


@pytest.mark.parametrize(("change", "words"), KEYS, ids=lambda value: str(value)[:50])
def test_keys(project, capsys, change, words):
    if words:
        refused(write(project, {**PPO, **change}), project, capsys, "run.yaml: ", *words)
        return
    from fastppo.config import config_from_dict  # two of one folder are two rewards

    names = [spec.name for spec in config_from_dict({**PPO, **change}).rewards]
    assert names == ["reward", "reward_2"]


@pytest.mark.parametrize(("url", "words"), URLS, ids=lambda value: str(value)[:30])
def test_urls(project, capsys, url, words):
    settings = {**PPO, "reward_model": url, "reward_model_type": "api"}
    refused(write(project, settings), project, capsys, "run.yaml: reward_model: ", *words)


def test_a_broken_url_is_shown_without_its_query(project, capsys):
    for url in ("htp://h/?key=s3cret", "http://h/ x?key=s3cret"):
        settings = {**PPO, "reward_model": url, "reward_model_type": "api"}
        refused(write(project, settings), project, capsys, "run.yaml: reward_model: ")
        main(["run.yaml"])
        assert "s3cret" not in capsys.readouterr().err


def test_a_type_that_is_none_in_stage_rm_too(project, capsys):
    words = ("reward_model_type: 'lorra' is none of", "did you mean lora?")
    refused(write(project, {**RM, "reward_model_type": "lorra"}), project, capsys, *words)


def test_a_password_in_a_url_is_refused_and_not_repeated(project, capsys):
    settings = {**PPO, "reward_model": "http://me:s3cret@host/", "reward_model_type": "api"}
    assert main(write(project, settings)) == 2
    err = capsys.readouterr().err
    assert "holds a user name or password" in err
    assert "FASTPPO_REWARD_TOKEN" in err
    assert "s3cret" not in err


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_names(project, capsys, name):
    settings = {**PPO, "reward_model": name, "reward_model_type": "function"}
    words = f"reward_model: '{name}' is not module:function with importable names"
    refused(write(project, settings), project, capsys, words, "mine.rewards:short")


def test_the_one_wrong_among_several_is_named(project, capsys):
    settings = {**PPO, "reward_model": f"reward,mine:f,{URL}x y"}
    settings["reward_model_type"] = "lora,function,api"
    refused(write(project, settings), project, capsys, "'http://127.0.0.1:9/scorex y' has char")
    settings["reward_model"] = "reward, absent"
    settings["reward_model_type"] = "lora"
    refused(write(project, settings), project, capsys, "reward_model: no folder absent")


FULL: list[tuple[Any, tuple[str, ...]]] = [
    (None, ("reward_model: ./full has no config.json", "check the path")),
    ("{", ("full/config.json cannot be read",)),
    ([1], ("is not a JSON object",)),
    ({"architectures": ["LlamaForCausalLM"]}, ("is a LlamaForCausalLM without value_head",)),
    ({"architectures": ["BertForSequenceClassification"]}, ("has 2 labels", "num_labels 1")),
    (
        {
            "architectures": ["BertForSequenceClassification"],
            "id2label": {"0": "a", "1": "b", "2": "c"},
        },
        ("has 3 labels",),
    ),
    ({"architectures": ["BertForTokenClassification"], "id2label": {"0": "a"}}, ("is a BertForT",)),
]


@pytest.mark.parametrize(("content", "words"), FULL, ids=lambda value: str(value)[:40])
def test_full_models(project, capsys, content, words):
    (project / "full").mkdir()
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (project / "full" / "config.json").write_text(text)
    settings = {**PPO, "reward_model": "./full", "reward_model_type": "full"}
    refused(write(project, settings), project, capsys, "run.yaml: ", *words)


def test_an_adapter_of_a_full_model_that_is_not_there(project, capsys):
    settings = {**PPO, "reward_model": "model", "reward_model_type": "full"}
    settings["reward_model_adapters"] = ["reward", "./absent"]
    words = ("reward_model_adapters: ./absent has no adapter_config.json", "check the path")
    refused(write(project, settings), project, capsys, *words)


def test_bits_without_the_package(project, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    write_head(project / "model", 32)
    settings = {**PPO, "reward_model": "model", "reward_model_type": "full"}
    settings["reward_model_quantization_bit"] = 8
    words = ("reward_model_quantization_bit: 8 needs a package", "'fastppo[quantization]'")
    refused(write(project, settings), project, capsys, *words)


def test_a_head_in_a_bin_file_is_enough_for_the_first_look(project, capsys):
    head = project / "reward" / "value_head.safetensors"
    head.rename(head.with_suffix(".bin"))
    from fastppo.config import config_from_dict
    from fastppo.preflight import check

    assert check(config_from_dict({**PPO})).train
    head.with_suffix(".bin").unlink()
    refused(write(project, PPO), project, capsys, "has no value head (value_head.safetensors)")
