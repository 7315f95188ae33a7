"""Keys of rollouts by vLLM and of the correction, and TRL's and verl's names for that."""

from __future__ import annotations

import pytest

from fastppo.config import config_from_dict
from fastppo.errors import UserError
from tests.project import PPO


@pytest.mark.parametrize(
    ("keys", "mode", "bounds"),
    [
        ({}, None, (None, 2.0)),
        ({"use_vllm": True}, "token_truncate", (None, 2.0)),
        ({"use_vllm": True, "rollout_is": "none"}, None, (None, 2.0)),
        ({"rollout_is_threshold": 3}, "token_truncate", (None, 3.0)),
        ({"rollout_is": "sequence_mask", "rollout_is_lower": 0.5}, "sequence_mask", (0.5, 2.0)),
        ({"rollout_is": "token"}, "token_truncate", (None, 2.0)),  # verl's
        ({"rollout_is": "sequence"}, "sequence_truncate", (None, 2.0)),
        ({"vllm_importance_sampling_correction": True}, "sequence_mask", (None, 3.0)),  # TRL's
        ({"vllm_importance_sampling_correction": False, "use_vllm": True}, None, (None, 2.0)),
        (
            {
                "vllm_importance_sampling_mode": "token_mask",
                "vllm_importance_sampling_clip_max": 4,
                "vllm_importance_sampling_clip_min": 0.25,
            },
            "token_mask",
            (0.25, 4.0),
        ),
        ({"vllm_importance_sampling_cap": 1.5}, "sequence_mask", (None, 1.5)),
    ],
)
def test_the_correction_by_every_name(keys, mode, bounds):
    made = config_from_dict({**PPO, **keys})
    assert (made.importance_mode, made.importance_bounds) == (mode, bounds)
    foreign = [name for name in keys if name.startswith("vllm_importance")]
    assert all(any(f"'{name}' is TRL's" in line for line in made.notes) for name in foreign)
    if keys.get("rollout_is") in ("token", "sequence"):
        assert any("is verl's" in line for line in made.notes)


def test_a_name_of_trls_beside_the_key_is_refused():
    keys = {"vllm_importance_sampling_mode": "token_mask", "rollout_is": "token_truncate"}
    with pytest.raises(UserError, match="is TRL's name for rollout_is; keep one of the two"):
        config_from_dict({**PPO, **keys})
