"""What is for runs of one process is refused with several, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastppo.config import Config, config_from_dict
from fastppo.config.effect import without_effect
from fastppo.config.parallel import ALONE, FSDP_WITHOUT, check_processes
from fastppo.errors import UserError
from tests.project import PPO

KEYS: dict[str, dict[str, Any]] = {
    "use_vllm": {"vllm_server_base_url": "http://127.0.0.1:8000"},
    "filter_groups": {"num_generations": 2},
    "load_best_model_at_end": {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1},
}


@pytest.mark.parametrize("key", ALONE)
def test_a_key_of_one_process_is_refused_with_several(project, key):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    config = config_from_dict({**PPO, **sizes, key: True, **KEYS[key]})
    check_processes(config, 1, "WORLD_SIZE")
    with pytest.raises(UserError, match=f"WORLD_SIZE: is 2, and {key} is for runs of one process"):
        check_processes(config, 2, "WORLD_SIZE")
    without = config_from_dict({**PPO, **sizes, **KEYS[key]})  # the line's cure
    check_processes(without, 2, "WORLD_SIZE")


def shared(**keys: Any) -> Any:
    """A configuration whose reward is no model."""
    reward = {"reward_model_type": "function", "reward_model": "fastppo.toy:vowels"}
    return config_from_dict({**PPO, **reward, **keys})


@pytest.mark.parametrize(
    "value", [True, "true", "full_shard", "full_shard auto_wrap", ["full_shard", "auto_wrap"]]
)
def test_what_transformers_calls_sharding_is_sharding(project, value):
    assert shared(fsdp=value).shards


@pytest.mark.parametrize("value", [None, False, "false", "", [], "none"])
def test_what_asks_for_no_sharding_is_the_default(project, value):
    config = shared(fsdp=value)
    assert not config.shards
    assert config.model_dump() == shared().model_dump()


def test_settings_of_fsdp_are_read_with_their_prefix_and_from_a_file(project):
    settings = {"fsdp_version": 2, "fsdp_reshard_after_forward": "true", "state_dict_type": "x"}
    Path("fsdp.json").write_text(json.dumps(settings), encoding="utf-8")
    for given in (settings, "fsdp.json"):
        config = shared(fsdp="full_shard", fsdp_config=given)
        assert config.fsdp_without_effect == ["state_dict_type"]
    with pytest.raises(UserError, match="fsdp_config: reshard_after_forward: false: not supported"):
        shared(fsdp="full_shard", fsdp_config={"reshard_after_forward": False})


def test_settings_of_fsdp_without_fsdp_are_said_to_do_nothing(project):
    config = shared(fsdp_config={"fsdp_version": 1})
    assert without_effect(config)["fsdp_config"] == "no effect without fsdp: full_shard"
    assert "fsdp_config" not in without_effect(shared(fsdp=True, fsdp_config={"version": 2}))


def test_every_key_that_does_not_go_with_fsdp_is_there_and_at_its_default_goes(project):
    for name, (values, _) in FSDP_WITHOUT.items():
        assert Config.model_fields[name].default in values, name
