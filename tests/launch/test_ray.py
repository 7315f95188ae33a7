"""The command that starts a run on Ray, and its worker, with a stub of Ray's few functions.

tests/peers/test_ray.py runs them on a real cluster.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from fastppo import cli
from fastppo.config import Config, config_from_dict, load_config
from fastppo.errors import TrainingStopped, UserError
from fastppo.launch import paths
from fastppo.launch import ray as command
from fastppo.run import durable, preflight
from fastppo.run.world import ALONE
from tests.project import PPO
from tests.reliability import runs


class ControllerError(Exception):
    def __init__(self, failure: Exception) -> None:
        super().__init__(str(failure))
        self.controller_failure = failure


class Dead(Exception):
    """As Ray wraps it, with a page of words around it."""

    health_check_failure = RuntimeError("the node died")


LOST = {1: Dead("Worker info: ..."), 0: TrainingStopped("has lost another")}


class WorkerGroupError(Exception):
    worker_failures = LOST


class Pointer:
    """A checkpoint of Ray's."""

    def __init__(self, place: str) -> None:
        self.files = {path.name: path.read_text() for path in Path(place).iterdir()}

    from_directory = classmethod(lambda cls, place: cls(place))

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        with TemporaryDirectory() as place:
            for name, text in self.files.items():
                Path(place, name).write_text(text)
            yield place


class Stub:
    """A cluster of which `fit` says how training ends; what it was asked for is noted."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.reports: list[tuple[dict[str, Any], Any]] = []
        self.rank, self.checkpoint, self.gpus = 0, None, 0
        self.outcome: BaseException | None = None

    def fit(self) -> None:
        task = self.asked["train_loop_config"]["task"]
        folder = Path(task.config.output_dir)
        self.asked["token"] = (folder / f".driver-{task.token}").read_text()
        if self.outcome is not None:
            raise self.outcome

    def trainer(self, work: Any, **asked: Any) -> Any:
        self.asked = {"work": work, **asked}
        return SimpleNamespace(fit=self.fit)

    @property
    def config(self) -> Config:
        """What a worker is given."""
        return self.asked["train_loop_config"]["task"].config


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """Ray's names, as far as they are used here."""
    stub, ray, train, torch = Stub(), *map(ModuleType, ("ray", "ray.train", "ray.train.torch"))
    made = SimpleNamespace
    vars(ray).update(__version__="2.60.0", train=train, shutdown=lambda: None)
    vars(ray).update(init=made, cluster_resources=lambda: {"CPU": 2, "GPU": stub.gpus})
    vars(train).update(
        torch=torch,
        UserCallback=object,
        Checkpoint=Pointer,
        ControllerError=ControllerError,
        TrainingFailedError=WorkerGroupError,
        get_checkpoint=lambda: stub.checkpoint,
        get_context=lambda: made(get_world_rank=lambda: stub.rank),
        report=lambda metrics, checkpoint=None: stub.reports.append((metrics, checkpoint)),
    )
    for name in ("Checkpoint", "Failure", "Logging", "Run", "Scaling"):
        setattr(train, f"{name}Config", made)
    vars(torch).update(TorchConfig=made, TorchTrainer=stub.trainer)
    for module in (ray, train, torch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(command, "LOG_SECONDS", 0)
    yield stub
    sys.modules.pop("fastppo.launch.ray_worker", None)  # it has the stub's names


@pytest.fixture
def worker(ray: Stub) -> Any:
    """The module that runs in a worker."""
    return importlib.import_module("fastppo.launch.ray_worker")


@pytest.fixture
def run(project: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command on the project's configuration; returns exit code and what it said."""

    def call(*words: str, keys: dict[str, Any] = PPO) -> tuple[int, str]:
        (project / "run.yaml").write_text(yaml.safe_dump(keys))
        before = written(project)
        code = command.main(["run.yaml", *words])
        if code == 2:
            assert written(project) == before
        return code, capsys.readouterr().err

    return call


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


TWO = ("--workers", "2")


def test_without_ray_a_line_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, said = run(*TWO)
    assert code == 2
    assert said.count("\n") == 1
    assert "Ray Train is not installed" in said
    assert "pip install '.[ray]'" in said


def test_an_old_ray_is_named_with_both_versions(run, ray):
    sys.modules["ray"].__version__ = "2.9.3"
    code, said = run(*TWO)
    assert code == 2
    assert "ray>=2.60 is needed, and here is 2.9.3" in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((*TWO, "--gpus-per-worker", "1", "use_cpu=true"), "leave one of the two out"),
        ((*TWO, "--gpus-per-worker", "1"), "Ray has 0 GPUs: a worker needs one of its own"),
        ((*TWO, "dataset=nowhere"), "names no 'nowhere'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_bad_input_is_a_line_and_exit_code_2(run, ray, words, line):
    code, said = run(*words)
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("fastppo.launch.ray: error: ")
    assert line in said
    assert not ray.asked


def test_checkpoints_of_an_earlier_run_are_refused_though_it_may_be_overwritten(run, ray, project):
    """After a failure the run would go on from them."""
    (project / "out" / "checkpoint-7").mkdir(parents=True)
    code, said = run(*TWO, "overwrite_output_dir=true")
    assert code == 2
    assert "output_dir: has checkpoint-7 of an earlier run" in said


def test_a_worker_in_another_folder_reads_what_the_driver_read(run, ray, project, monkeypatch):
    (project / "more.jsonl").write_text('{"instruction": "Hi"}\n')
    keys = {**PPO, "dataset": "prompts,more.jsonl", "metrics_dir": "metrics", "cache_dir": "hub"}
    code, said = run(*TWO, keys=keys)
    assert (code, said) == (0, "")
    assert ray.asked["token"] == ray.asked["train_loop_config"]["task"].token
    config = ray.config.model_copy(update={"overwrite_output_dir": True})
    for key in ("output_dir", "metrics_dir", "cache_dir", "model_name_or_path", "reward_model"):
        assert getattr(config, key) == str(project / getattr(load_config("run.yaml"), key)), key
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    assert len(preflight.check(config, shared=True).train) == 5


def test_names_that_are_no_paths_stay(project):
    names = {
        "model_name_or_path": "owner/model",
        "reward_model": "owner/reward,reward,mine.rewards:short,http://127.0.0.1:8000/v1",
        "reward_model_type": "full,lora,function,api",
        "dataset": "prompts",
    }
    (project / "prompts").mkdir()  # a name of dataset_info.json wins over a folder
    found = paths.with_absolute_paths(config_from_dict({**PPO, **names}))
    assert (found.model_name_or_path, found.dataset) == ("owner/model", "prompts")
    assert found.reward_model.split(",") == [
        "owner/reward",
        str(project / "reward"),
        "mine.rewards:short",
        "http://127.0.0.1:8000/v1",
    ]


def test_a_path_to_settings_of_fsdp_is_made_absolute_and_a_mapping_left_alone(project):
    (project / "fsdp.json").write_text('{"version": 2}')
    keys = {**PPO, "fsdp": "full_shard"}
    found = paths.with_absolute_paths(config_from_dict({**keys, "fsdp_config": "fsdp.json"}))
    assert found.fsdp_config == str(project / "fsdp.json")
    mapping = {"fsdp_version": 2}
    found = paths.with_absolute_paths(config_from_dict({**keys, "fsdp_config": mapping}))
    assert found.fsdp_config == mapping


def test_every_key_that_names_a_path_is_made_absolute():
    words = re.compile(r"\b[Ff]older|\bpaths?\b|^Where .* go\b|^Adapters |^Data sets ")
    made = {*paths.FOLDERS, *paths.FILES, *paths.MODELS, *paths.LISTS, *paths.DATA, "dataset_dir"}
    assert made <= Config.model_fields.keys()
    named = {
        name for name, field in Config.model_fields.items() if words.search(field.description or "")
    }
    assert named >= {"output_dir", "metrics_dir", "cache_dir", "dataset_dir", "dataset"}
    assert named <= made


@pytest.mark.parametrize(
    ("outcome", "code", "words"),
    [
        (WorkerGroupError("lost"), 1, "--max-failures 3; the last time: worker 1: the node died;"),
        (ControllerError(RuntimeError("no room")), 1, "stopped: Ray Train failed: no room"),
        (ControllerError(UserError("process 1 of 2 has another seed")), 2, "has another seed"),
    ],
    ids=["failures used up", "Ray itself", "bad input in a worker"],
)
def test_how_training_ended_is_a_line_and_an_exit_code(run, ray, project, outcome, code, words):
    ray.outcome = outcome
    found, said = run(*TWO)
    assert (found, said.count("\n")) == (code, 1)
    assert words in said
    assert not list(project.glob("out/.driver-*"))


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_driver_ends_its_waiting(run, ray, monkeypatch, number):
    def fit() -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(ray, "fit", fit)
    before, began = signal.getsignal(number), time.monotonic()
    code, said = run(*TWO)
    assert (code, said.count("\n")) == (128 + number, 1)
    assert f"stopped by {number.name}; resume_from_checkpoint: true goes on" in said
    assert signal.getsignal(number) == before
    assert time.monotonic() - began < 30


def test_what_ray_train_is_asked_for(run, ray, project):
    ray.gpus = 2
    assert run(*TWO, "--max-failures", "5", "--cpus-per-worker", "3", "ddp_timeout=60")[0] == 0
    scaling, asked = ray.asked["scaling_config"], ray.asked["run_config"]
    assert (scaling.num_workers, scaling.use_gpu) == (2, True)
    assert scaling.resources_per_worker == {"CPU": 3, "GPU": 1}
    assert asked.failure_config.max_failures == 5
    assert asked.storage_path == str(project / "out" / "ray")
    assert vars(ray.asked["torch_config"]) == {"backend": "cpu:gloo,cuda:nccl", "timeout_s": 60}
    assert not ray.config.use_cpu
    assert run(*TWO, "use_cpu=true", "overwrite_output_dir=true", "--storage", "state")[0] == 0
    assert ray.asked["scaling_config"].resources_per_worker == {"CPU": 1}
    assert ray.asked["run_config"].storage_path == str(project / "state")
    assert ray.asked["torch_config"].backend == "gloo"
    assert ray.asked["run_config"].failure_config.max_failures == 3


def test_storage_that_is_not_shared_is_a_line(worker, tmp_path):
    worker.token_file(tmp_path, "abc").write_text("abc")
    worker.check_shared(tmp_path, "abc")
    for folder, token in ((tmp_path, "def"), (tmp_path / "not here", "abc")):
        with pytest.raises(UserError, match=r"is not the driver's folder: name one on a file sys"):
            worker.check_shared(folder, token)


def checkpoint(folder: Path, *, whole: bool = True) -> Path:
    """A folder that a run can go on from, or one that a file is missing in."""
    place = durable.partial_folder(folder)
    for name in (durable.TRAINING_STATE, "weights"):
        (place / name).write_text("{}")
    durable.publish(place, folder)
    if not whole:
        (folder / "weights").unlink()
    return folder


def test_the_newest_complete_checkpoint_decides_where_a_start_begins(worker, ray, project, capsys):
    """And neither Ray's pointer nor what the file says; a torn one is passed over."""
    out = project / "out"
    config = config_from_dict({**PPO, "output_dir": str(out), "resume_from_checkpoint": True})
    start = worker.resumed(config, ALONE)
    assert (start.resume_from_checkpoint, start.overwrite_output_dir) == (None, True)
    whole = checkpoint(out / "checkpoint-10")
    checkpoint(out / "checkpoint-9")
    assert worker.resumed(config, ALONE).resume_from_checkpoint == str(whole)
    assert not capsys.readouterr().err
    torn = checkpoint(out / "checkpoint-12", whole=False)
    worker.report(torn)
    ray.checkpoint = ray.reports[-1][1]
    assert worker.resumed(config, ALONE).resume_from_checkpoint == str(whole)
    assert f"{torn} was reported, but is not complete: the run goes on" in capsys.readouterr().err


def test_every_worker_reports_and_the_first_gives_a_pointer_of_a_few_bytes(worker, ray, tmp_path):
    for ray.rank in (0, 1):
        worker.report(tmp_path / "checkpoint-4")
    facts = {"step": 4, "checkpoint": str(tmp_path / "checkpoint-4")}
    (first, pointer), (second, none) = ray.reports
    assert (first, second, none) == (facts, facts, None)
    assert {name: json.loads(text) for name, text in pointer.files.items()} == {
        "checkpoint.json": facts
    }


def test_bad_input_in_a_worker_starts_nothing_again(worker, capsys):
    failures = worker.Failures(2)
    with pytest.raises(ControllerError) as caught:
        failures.after_exception(None, {1: UserError("seed"), 0: TrainingStopped("lost another")})
    assert isinstance(caught.value.controller_failure, UserError)
    for count in (1, 2, 3):
        failures.after_exception(None, LOST)
        line = capsys.readouterr().out
        assert f"failure {count} of 2: worker 1: the node died; " in line
        assert ("start again" in line) == (count < 3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo", "rm"])
def test_a_launcher_is_told_of_each_checkpoint_once_it_is_whole(tmp_path, stage):
    changes = {"reward_model": "fastppo.toy:vowels", "eval_judge": "fastppo.toy:vowels"}
    make = {"ppo": lambda folder: runs.ppo(folder, **changes), "rm": runs.rm}[stage]
    seen: list[tuple[str, str | None]] = []
    config = config_from_dict(make(tmp_path / "run"))
    cli.run(config, lambda folder: seen.append((folder.name, durable.checkpoint_fault(folder))))
    assert [name for name, _ in seen][:2] == ["checkpoint-2", "checkpoint-4"]
    assert {fault for _, fault in seen} == {None}
