"""What the tests of a process share: roles, each test getting a copy, and folders only read."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastppo.config import Config
from fastppo.config.data import DataKeys
from fastppo.config.memory import StepKeys, offload_mode
from fastppo.config.ppo import PPOKeys
from fastppo.config.training import TrainingKeys
from fastppo.models import build as roles

# What decides no weight, nor where a role runs: data, schedule, arithmetic, files.
ELSEWHERE = {
    *(DataKeys.model_fields | PPOKeys.model_fields | StepKeys.model_fields),
    *(TrainingKeys.model_fields.keys() - {"bf16", "fp16"}),
    *("output_dir", "metrics_dir", "overwrite_output_dir", "resume_from_checkpoint", "source"),
    *("max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "eval_max_samples"),
}


class BuiltOnce:
    """`roles.build` for tests: equal roles are built once, and each caller gets a copy.

    Roles are equal where the keys that they read are, and the random numbers that they draw. A copy
    takes a quarter of the time. What lies below a test's own folder can change between two calls,
    and layers that recompute, move activations or stream hold functions that a copy would share:
    those are built anew.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[str, bytes], tuple[roles.Roles, torch.Tensor]] = {}

    def __call__(self, config: Config, device: torch.device, own: Path) -> roles.Roles:
        keys = json.dumps(config.model_dump(mode="json", exclude=ELSEWHERE), sort_keys=True)
        own_files = str(own) in keys or str(own) in str(Path.cwd())
        hooked = offload_mode(config) != "none" or config.stream_frozen
        if own_files or hooked or config.create_new_adapter:
            return roles.build(config, device)
        key = (f"{keys} {config.has_critic}", torch.get_rng_state().numpy().tobytes())
        if key not in self.known:
            self.known[key] = (roles.build(config, device), torch.get_rng_state())
        made, random = self.known[key]
        torch.set_rng_state(random)
        return copy.deepcopy(made)


@contextmanager
def unchanged(folder: Path) -> Iterator[Path]:
    """The folder, which must hold the same bytes in the end as in the beginning."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = files()
    yield folder
    after = files()
    changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    assert not changed, f"a test changed what others read: {', '.join(map(str, sorted(changed)))}"
