"""Runs a command of the project in a process of its own, as other trainers' processes start."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(python: str | Path, *command: str, path: Path | None = None) -> str:
    """What a command prints, whose processes import from the project and from `path`."""
    folders = [str(ROOT), *([str(path)] if path else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "HF_HUB_OFFLINE": "1"}
    # Ray hides the devices of a worker that asked for none, unless told not to.
    env |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    found = subprocess.run(
        [str(python), *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout
