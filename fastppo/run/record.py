"""What a run records of itself in output_dir for `fastppo-report`: settings, machine, outcome."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo import __version__
from fastppo.config.explain import written
from fastppo.config.schema import INTERNAL
from fastppo.errors import Interrupted, one_line
from fastppo.memory.command import table
from fastppo.run.durable import INFO, write_text

if TYPE_CHECKING:
    import torch

    from fastppo.config import Config
    from fastppo.memory.plan import Plan

PACKAGES = ("torch", "transformers", "peft", "accelerate")


def begin(
    config: Config, device: torch.device, notes: Sequence[str] = (), plan: Plan | None = None
) -> None:
    """Write the record of a run that starts or resumes; `notes` are those that it printed."""
    record = {
        "fastppo": __version__,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": machine(device),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "process": {"pid": os.getpid(), "host": platform.node()},
        "stage": config.stage,
        "model": config.model_name_or_path,
        "dataset": config.dataset,
        "rewards": [without_secrets(f"{spec.name} ({spec.kind})") for spec in config.rewards],
        "metrics_dir": str(Path(config.metrics_dir).resolve()),
        "settings": changed_settings(config),
        "notes": [without_secrets(line) for line in notes],
        "plan": [] if plan is None else table(plan),
    }
    write(Path(config.output_dir), record)


def machine(device: torch.device) -> str:
    """The device in words: its name and size, or the processor and its cores."""
    if device.type == "cuda":
        import torch

        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB"
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores), {platform.system()}"


def changed_settings(config: Config) -> dict[str, str]:
    """Key -> value in YAML, of the keys that are not at their default; secrets are hidden."""
    fields = type(config).model_fields
    return {
        name: without_secrets(written(name, getattr(config, name)))
        for name in sorted(config.model_fields_set - INTERNAL)
        if name in fields and getattr(config, name) != fields[name].default
    }


def without_secrets(text: str) -> str:
    """`text` without what URLs in it carry before an @ or after a question mark."""
    return re.sub(r"(\w+://[^\s?]*\?)\S*", r"\1***", re.sub(r"(\w+://)[^\s/@]*@", r"\1***@", text))


def write(folder: Path, record: dict[str, Any]) -> None:
    """Write the record into `folder`, completely or not at all."""
    write_text(folder / INFO, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def add(folder: Path, **facts: Any) -> None:
    """Add facts to this process's record in `folder`; another run's record is left alone."""
    with suppress(OSError, ValueError):
        record = json.loads((folder / INFO).read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("process") == {
            "pid": os.getpid(),
            "host": platform.node(),
        }:
            write(folder, {**record, **facts})


@contextmanager
def outcome(folder: Path) -> Iterator[None]:
    """Record how the run in the block ends: finished, interrupted, or stopped by an error."""
    try:
        yield
    except Interrupted as stop:
        name = signal.Signals(stop.signal).name
        add(folder, ended=f"interrupted by {name}: {one_line(stop)}", ended_at=now())
        raise
    except BaseException as error:
        what = one_line(error) or type(error).__name__
        add(folder, ended=f"stopped: {without_secrets(what)}", ended_at=now())
        raise
    add(folder, ended="finished", ended_at=now())


def now() -> str:
    """The time of day, as in the record's `started`."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
