"""PPO for language models on one GPU: operators, a command, and a training loop in Python."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["PPOConfig", "PPOTrainer", "__version__", "evaluate", "init_state", "step_update"]

_HOMES = {
    "init_state": "fastppo.ppo.state",
    "step_update": "fastppo.ppo.trainer",
    "evaluate": "fastppo.ppo.evaluation",
    "PPOConfig": "fastppo.trainer.arguments",
    "PPOTrainer": "fastppo.trainer.ppo_trainer",
}


def __getattr__(name: str) -> Any:
    """Import `name` on first use, so that `import fastppo` alone does not import torch."""
    if name in _HOMES:
        from fastppo import packages

        if missing := packages.missing_for_training():
            raise ImportError(f"fastppo.{name}: {missing}")
        packages.hide_unavoidable()
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastppo' has no attribute '{name}'")
