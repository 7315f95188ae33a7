"""One process on one device, however many devices are visible and whatever launched it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastppo import seeds
from fastppo.config import Config
from fastppo.rm import train as reward_model
from fastppo.run import training_state
from fastppo.run.preflight import check
from tests.tiny import preferences

# What torchrun and accelerate launch set for their only process.
ALONE = {
    "WORLD_SIZE": "1",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
    "ACCELERATE_MIXED_PRECISION": "fp16",
}
SEVERAL = 4


@pytest.fixture
def train(model_dir: Path, tmp_path: Path):
    """Run stage rm on the CPU: its result files, by name of the run."""
    (tmp_path / "pairs.json").write_text(json.dumps(preferences(12)))

    def make(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        settings = Config(
            stage="rm",
            model_name_or_path=str(model_dir),
            dataset=str(tmp_path / "pairs.json"),
            template="chatml",
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            num_train_epochs=1,
            **changes,
        )
        reward_model.run(settings, check(settings))
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        return {"steps": torch.tensor(state["global_step"]), **weights}

    return make


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model was wrapped in, to run on several devices or in several processes."""
    found: list[str] = []
    for module in (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel):
        real = module.__init__

        def noted(self: Any, *args: Any, real=real, **kwargs: Any) -> None:
            found.append(type(self).__name__)
            real(self, *args, **kwargs)

        monkeypatch.setattr(module, "__init__", noted)
    return found


def assert_same(run: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert run.keys() == other.keys()
    assert all(torch.equal(run[name], other[name]) for name in run)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_reward_model_is_the_same_however_many_gpus_are_visible(
    train, wrapped, monkeypatch, checkpointing
):
    """12 pairs in batches of 2 are 6 steps; on four devices it would be batches of 8, and 2."""
    changes = {"disable_gradient_checkpointing": not checkpointing}
    one = train("one", **changes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: SEVERAL)
    several = train("several", **changes)
    assert wrapped == []
    assert one["steps"] == 6
    assert_same(one, several)


def test_a_batch_is_per_device_train_batch_size_pairs(model_dir, tmp_path, monkeypatch):
    settings = Config(
        stage="rm",
        model_name_or_path=str(model_dir),
        dataset="x",
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: SEVERAL)
    made = reward_model.training_arguments(settings, 12)
    assert (made.train_batch_size, made.eval_batch_size, made.n_gpu) == (2, 3, 1)


@pytest.mark.parametrize("use_cpu", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_launchers_only_process_trains_as_any_other(train, wrapped, monkeypatch, use_cpu):
    """No process group, no DDP around the model, and no precision but the file's."""
    plain = train("plain", use_cpu=use_cpu)
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    launched = train("launched", use_cpu=use_cpu)
    assert wrapped == []
    assert not torch.distributed.is_initialized()
    assert_same(plain, launched)


def test_a_checkpoint_of_many_visible_gpus_resumes_on_one(tmp_path, monkeypatch):
    """The generator of the run's device is kept, and no other's."""
    places: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: SEVERAL)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    def get(device: Any = "cuda") -> torch.Tensor:
        return torch.tensor([7], dtype=torch.uint8)

    def put(new_state: torch.Tensor, device: Any = "cuda") -> None:
        assert device == "cuda", f"device {device} is not there on a machine with one"
        places.append(new_state.tolist())

    monkeypatch.setattr(torch.cuda.random, "get_rng_state", get)
    monkeypatch.setattr(torch.cuda.random, "set_rng_state", put)
    monkeypatch.setattr(torch.cuda, "get_rng_state", get)
    monkeypatch.setattr(torch.cuda, "set_rng_state", put)
    training_state.write(seeds.random_state(), tmp_path)
    seeds.set_random_state(training_state.read(tmp_path))
    assert places == [[7]]
