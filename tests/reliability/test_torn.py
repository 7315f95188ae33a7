"""Checkpoint files that a crash, a bad disk or a careless copy left broken."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from fastppo.run import durable
from tests.reliability import runs


def cut(path: Path, generator: random.Random) -> None:
    """The end is missing."""
    data = path.read_bytes()
    path.write_bytes(data[: generator.randrange(len(data))])


def flip(path: Path, generator: random.Random) -> None:
    """One bit is another."""
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(bytes(data))


def zero(path: Path, generator: random.Random) -> None:
    """As long as it was, of zeros: what some file systems leave of a file that was not flushed."""
    path.write_bytes(bytes(path.stat().st_size))


def delete(path: Path, generator: random.Random) -> None:
    """It is gone."""
    path.unlink()


CASES = [
    ("ppo", cut, "training_state.safetensors"),
    ("ppo", flip, "training_state.safetensors"),
    ("ppo", zero, "adapter_model.safetensors"),
    ("ppo", delete, "training_state.json"),
    ("ppo", cut, "manifest.json"),
    ("ppo", flip, "any"),
    ("ppo", cut, "any"),
    ("rm", cut, "optimizer.pt"),
    ("rm", flip, "training_state.safetensors"),
    ("rm", zero, "manifest.json"),
    ("rm", delete, "any"),
]


@pytest.fixture(scope="session")
def two_checkpoints(home):
    """The output folder of a run that stopped with two whole checkpoints; made once a stage."""
    known: dict[str, Path] = {}

    def get(stage: str) -> Path:
        if stage not in known:
            make, saves = {"ppo": (runs.ppo, 4), "rm": (runs.rm, 5)}[stage]
            mine = make(home / f"two-{stage}", save_steps={"ppo": 1, "rm": 2}[stage])
            code, said = runs.run(mine, runs.limit_files, saves, 0)
            assert code == 1, said
            known[stage] = Path(mine["output_dir"])
        return known[stage]

    return get


@pytest.mark.parametrize(("stage", "tear", "what"), CASES)
def test_a_torn_checkpoint_is_passed_over_and_said_to_be(
    settings, unbroken, two_checkpoints, stage, tear, what
):
    generator = random.Random(f"{stage} {tear.__name__} {what}")
    mine = settings(stage)
    out = Path(mine["output_dir"])
    shutil.copytree(two_checkpoints(stage), out)
    older, newest = durable.checkpoints(out)
    name = generator.choice(durable.files_of(newest)).relative_to(newest) if what == "any" else what
    tear(newest / name, generator)
    code, said = runs.resume(mine)
    assert code == 0, said
    assert f"{newest} is torn and passed over" in " ".join(said.split())
    assert f"from {older}" in " ".join(said.split())
    assert runs.differences(runs.result(mine), unbroken(stage)) == []
