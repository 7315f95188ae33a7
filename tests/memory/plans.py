"""Inputs of a plan without a file: the defaults of the keys, and changes that nothing checks."""

from __future__ import annotations

from typing import Any

from fastppo.config import config_from_dict
from fastppo.memory.inputs import PlanInputs

CONFIG = config_from_dict(
    {
        "stage": "ppo",
        "model_name_or_path": "model",
        "reward_model": "reward",
        "dataset": "prompts",
        "output_dir": "out",
    }
)


def plan_inputs(*, rewards: tuple[str, ...] = ("lora",), **changes: Any) -> PlanInputs:
    """The inputs of stage ppo with rewards of these kinds, and with some keys or fields changed."""
    names = {"function": "module:function", "api": "http://localhost/score"}
    keys = {
        "reward_model_type": ",".join(rewards),
        "reward_model": ",".join(names.get(kind, "reward") for kind in rewards),
    }
    return PlanInputs(CONFIG.model_copy(update=keys)).with_changes(**changes)
