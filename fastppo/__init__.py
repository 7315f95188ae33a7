"""PPO for language models on one GPU: operators, a command, and the loop as three functions."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "init_state", "step_update"]

_HOMES = {
    "init_state": "fastppo.ppo.state",
    "step_update": "fastppo.ppo.trainer",
    "evaluate": "fastppo.ppo.evaluation",
}


def __getattr__(name: str) -> Any:
    """Import torch only for who asks for it; `import fastppo` alone is light."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastppo' has no attribute '{name}'")
