"""Whether the processes of a run were started alike: keys, data, versions, weights, checkpoint."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from array import array
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastppo import __version__
from fastppo.run.record import PACKAGES

if TYPE_CHECKING:
    from torch import nn

    from fastppo.config import Config
    from fastppo.run.world import World

CURE = "start all of them with the same file, data, checkpoints, weights and packages"


def check_agreement(
    world: World,
    config: Config,
    *,
    decided: Collection[str],
    rows: Iterable[Sequence[int]],
    models: Iterable[nn.Module],
    resumed: Path | None,
) -> None:
    """Check that all processes run the same; one alone does.

    Args:
        world: the run's processes.
        config: this one's.
        decided: keys that the memory plan has decided; they may differ, as may the devices.
        rows: the encoded data.
        models: those that the run has loaded; a few numbers of each weight are compared.
        resumed: the checkpoint that the run resumes from.

    Raises:
        UserError: what differs, and in which process.
    """
    if world.size == 1:
        return
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    facts = {
        **config.model_dump(mode="json", exclude={"source", *decided}),
        "versions of packages": [__version__, platform.python_version(), packages],
        "weights": [sample(model) for model in models],
        "checkpoint": str(resumed),
    }
    digests = {
        key: hashlib.sha256(json.dumps(value).encode()).hexdigest() for key, value in facts.items()
    }
    world.agree({**digests, "data": digest(rows)}, CURE)


def digest(rows: Iterable[Sequence[int]]) -> str:
    """SHA-256 of rows of numbers and their lengths."""
    found = hashlib.sha256()
    for row in rows:
        found.update(len(row).to_bytes(8, "big"))
        found.update(array("q", row).tobytes())
    return found.hexdigest()


def sample(model: nn.Module) -> list[list[float]]:
    """A few numbers of each of a model's parameters."""
    found = []
    for parameter in model.parameters():
        # Of a weight that is sharded (a DTensor, which has a mesh) each process has another part.
        if parameter.device.type != "meta" and not hasattr(parameter, "device_mesh"):
            flat = parameter.detach().flatten()
            found.append(flat[:: max(1, flat.numel() // 8)].float().tolist())
    return found
