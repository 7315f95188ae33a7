"""What is for runs of one process is refused with several, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from fastppo.config import config_from_dict
from fastppo.config.parallel import ALONE, check_processes
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
