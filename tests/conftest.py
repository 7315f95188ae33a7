"""What holds for every test: Triton's interpreter in place of a GPU, and nothing left behind."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# A shell's background job has Ctrl-C ignored, and its children would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton's interpreter is chosen at import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A version is read from up to 140 kB of a package's description, and a command asks for eleven.
importlib.metadata.version = functools.cache(importlib.metadata.version)

# Which test runs, and where torch.compile found its cache to be.
NOTES = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}


WITHOUT_TRAINER = ("ops", "gpu")  # folders that need torch and no more


def pytest_configure(config: pytest.Config) -> None:
    """The trainer's fixtures: `tests.tiny` (a tiny model), `tests.project` (a user's files)."""
    if getattr(config.option, "tx", None) and not hasattr(config, "workerinput"):
        return  # xdist's other processes run the tests, and wait for what this one imports
    named = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    if all(any(part in WITHOUT_TRAINER for part in path.parts) for path in named):
        return
    for plugin in ("tests.tiny", "tests.project"):
        config.pluginmanager.import_plugin(plugin)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The second pass imports the files that have a test for it and no other."""
    if not config.option.markexpr.startswith("alone") or collection_path.suffix != ".py":
        return None
    if "gpu" in collection_path.parts:  # its conftest.py marks what is there
        return None
    return "mark.alone" not in collection_path.read_text(encoding="utf-8") or None


# Files that take longest come first: what is left in the end then keeps every process busy.
LONGEST = (
    "static/test_kernels.py",
    "ops/test_edges.py",
    "ops/test_layouts.py",
    "ops/test_registration.py",
    "ops/test_linear_costs.py",
    "models/test_shared_layers.py",
    "static/test_gpu_suite.py",
    "config/test_bad_input.py",
    "config/test_fuzz.py",
    "memory/test_plan_measured.py",
    "memory/test_retry.py",
    "models/test_roles_starts.py",
    "e2e/test_rm_then_ppo.py",
    "e2e/test_finetuning_types.py",
    "run/test_bad_models.py",
    "run/test_training_keys.py",
    "trainer/test_callbacks.py",
    "trainer/test_objects.py",
    "trainer/test_ppo_trainer.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONGEST)}

    def at(item: pytest.Item) -> int:
        return place.get("/".join(item.path.parts[-2:]), len(place))

    items.sort(key=at)


def pytest_collection_finish() -> None:
    """What is imported by now stays: a full collection over all of it takes half a second, and a
    quarter of the suite went into them."""
    gc.collect()
    gc.freeze()


def process_state() -> dict[str, Any]:
    """What all tests of a process share and each must leave as it found it."""
    return {
        "the working directory": os.getcwd(),
        "sys.meta_path": list(sys.meta_path),
        "handlers of signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        "torch's threads": torch.get_num_threads(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "gradients on or off": torch.is_grad_enabled(),
        "what transformers replaces while it loads a model": (
            torch.linspace.__name__,
            tie_weights(),
        ),
    }


def tie_weights() -> str:
    """The name of the function by which transformers ties embeddings, imported or not yet."""
    modeling = sys.modules.get("transformers.modeling_utils")
    loaded = getattr(modeling, "PreTrainedModel", None)
    return "tie_weights" if loaded is None else str(loaded.tie_weights.__name__)


def module_attributes() -> dict[str, dict[str, Any]]:
    """What the modules of fastppo hold, by module and name."""
    modules = list(sys.modules.items())
    return {name: dict(vars(m)) for name, m in modules if name.startswith("fastppo")}


def replaced(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> list[str]:
    """Functions, classes and constants that are others now; what was not there before may come."""
    return [
        f"fastppo's modules: {name}.{key}"
        for name, old in before.items()
        if list(map(id, old.values())) != list(map(id, after[name].values()))
        for key, value in old.items()
        if (callable(value) or key.isupper())
        and value is not after[name].get(key)
        and not key.startswith("__")  # torch.compile's own
    ]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What changed, by name."""
    names = [name for name, value in before.items() if after[name] != value]
    return [f"{name}: {after[name]} in place of {before[name]}" for name in names]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each test starts with the same random numbers, and puts back what it changes.

    So the order of tests, and which process runs which file, changes no result. What the commands
    do to a process that is theirs is undone here: environment, `sys.path`, a user's modules.
    """
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global one, for whoever draws from it
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    environment, path, modules = dict(os.environ), list(sys.path), set(sys.modules)
    before = process_state()
    yield
    sys.path[:] = path
    if sys.modules.keys() != modules:  # which is quicker to see than what is new
        own = str(tmp_path_factory.getbasetemp())
        for name in sys.modules.keys() - modules:
            if str(getattr(sys.modules[name], "__dict__", {}).get("__file__")).startswith(own):
                del sys.modules[name]
    for name in os.environ.keys() - environment.keys() - NOTES:
        del os.environ[name]
    os.environ.update({k: v for k, v in environment.items() if k not in NOTES})
    left = differences(before, process_state())
    assert not left, f"left behind: {'; '.join(left)}"


@pytest.fixture(autouse=True, scope="module")
def _nothing_stays_patched() -> Iterator[None]:
    """Looked at once a file: over all modules it takes longer than most tests."""
    before = module_attributes()
    yield
    left = replaced(before, module_attributes())
    assert not left, f"a test of this file left behind: {'; '.join(left)}"
