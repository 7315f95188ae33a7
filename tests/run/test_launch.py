"""Launchers: torchrun's processes share a run; those of others are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastppo import cli
from fastppo.config import config_from_dict
from fastppo.errors import UserError
from fastppo.export import cli as export
from fastppo.run import launch, preflight
from tests.project import PPO, RM

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}


def written(project: Path) -> list[str]:
    return sorted(str(path.relative_to(project)) for path in project.rglob("*"))


def set_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def files(project: Path) -> Path:
    """The project with the YAML of both stages."""
    for name, keys in (("ppo", PPO), ("rm", RM)):
        (project / f"{name}.yaml").write_text(yaml.safe_dump(keys))
    return project


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that a command got to, in place of running them."""
    from fastppo.ppo import trainer
    from fastppo.rm import train as reward_model

    found: list[str] = []
    for stage, module in (("ppo", trainer), ("rm", reward_model)):
        monkeypatch.setattr(module, "run", lambda *_, stage=stage: found.append(stage))
    return found


@pytest.mark.parametrize("stage", ["ppo", "rm"])
@pytest.mark.parametrize(
    "variables",
    [
        TORCHRUN,
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "8", "PMI_RANK": "0"},
        {"MV2_COMM_WORLD_SIZE": "2"},
        {"HOROVOD_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
        # torchrun on two nodes with a process each
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_one_of_several_processes_is_refused_and_the_cure_works(
    files: Path, monkeypatch, capsys, started, stage, variables
):
    before = written(files)
    set_environment(monkeypatch, variables)
    assert cli.main([f"{stage}.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for name in said.split("or unset ")[1].split():
        monkeypatch.delenv(name)
    assert (written(files), started) == (before, [])
    assert cli.main([f"{stage}.yaml"]) == 0
    assert started == [stage]


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        # In a batch script: what srun would start, and the script itself runs once.
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NUM_NODES": "2"},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "none"},
    ],
    ids=str,
)
def test_a_single_process_is_none_of_several(files: Path, monkeypatch, started, variables):
    set_environment(monkeypatch, variables)
    assert cli.main(["ppo.yaml"]) == 0
    assert started == ["ppo"]


def test_the_loop_as_functions_is_refused_too(files: Path, monkeypatch):
    set_environment(monkeypatch, TORCHRUN)
    with pytest.raises(UserError, match="WORLD_SIZE: is 2"):
        preflight.check(config_from_dict({**PPO}))


def test_an_export_by_several_processes_is_refused(files: Path, monkeypatch, capsys):
    set_environment(monkeypatch, TORCHRUN)
    before = written(files)
    assert export.main(["reward", "exported", "model_name_or_path=./model"]) == 2
    said = capsys.readouterr().err
    assert "WORLD_SIZE: is 2" in said
    assert "would all write export_dir; fastppo-export is one process" in said
    assert written(files) == before


def test_explain_and_plan_run_in_every_process_of_a_launcher(files: Path, monkeypatch, capsys):
    """--explain is of the file, and --plan of the memory that the one process would take."""
    set_environment(monkeypatch, TORCHRUN)
    before = written(files)
    assert cli.main(["ppo.yaml", "--explain"]) == 0
    monkeypatch.setattr("fastppo.memory.command.run", lambda *_: 0)
    assert cli.main(["ppo.yaml", "--plan"]) == 0
    assert written(files) == before
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_itself_writes_nothing(files: Path):
    """Two real processes, and a prompt a step for one of them.

    torchrun kills the second where the first has ended before it spoke.
    """
    before = written(files)
    command = ["torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "fastppo.cli"]
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", *command, "ppo.yaml", "per_device_train_batch_size=1"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 1
    assert done.stderr.count("fastppo-train: error: WORLD_SIZE: is 2") in (1, 2)
    assert "exitcode  : 2" in done.stderr
    assert written(files) == before


def test_a_gpu_that_torch_does_not_see_gets_a_line(tmp_path, monkeypatch):
    """A torch without CUDA would train a 7B on the CPU, for weeks and without a word."""
    driver, config = tmp_path / "version", config_from_dict(PPO)
    cpu = torch.device("cpu")
    assert launch.note_on_device(config, cpu, driver) is None
    driver.write_text("NVRM", encoding="utf-8")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a build without CUDA: install one" in launch.note_on_device(config, cpu, driver)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "look at nvidia-smi" in launch.note_on_device(config, cpu, driver)
    assert launch.note_on_device(config_from_dict({**PPO, "use_cpu": True}), cpu, driver) is None
    assert launch.note_on_device(config, torch.device("cuda"), driver) is None


def test_what_accelerate_was_told_of_fsdp_is_not_read_and_a_line_says_so(monkeypatch):
    from fastppo.run.sharding import shard_base

    config: Any = config_from_dict(PPO)
    nothing: Any = None
    assert shard_base(config, nothing, nothing, nothing) == []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    (line,) = shard_base(config, nothing, nothing, nothing)
    assert "ACCELERATE_USE_FSDP" in line
    assert "fsdp: full_shard" in line
