"""What a run that was cut off leaves to look at, and that trackers see one run, not two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as accelerate_tracking

from fastppo.errors import Interrupted, TrainingStopped
from fastppo.ppo import trainer
from fastppo.rm import train as reward_model
from fastppo.rm import trainer as pair_trainer
from fastppo.run import plots, preflight
from fastppo.run.preflight import check
from tests.limits import HANGS

PNG = b"\x89PNG"
END = b"IEND\xaeB`\x82"


def whole_picture(path: Path) -> bool:
    data = path.read_bytes()
    return data.startswith(PNG) and data.endswith(END)


@pytest.mark.slow  # a process of its own; what is drawn after which step is tested below
@pytest.mark.alone
def test_a_run_that_is_killed_has_a_picture_of_what_it_logged(config, tmp_path):
    """SIGKILL, from outside, of the command; no checkpoint was due and no evaluation."""
    settings = config(max_steps=500, save_strategy="no")
    (tmp_path / "run.json").write_text(json.dumps(settings.model_dump(exclude_none=True)))
    rows = tmp_path / "metrics" / "training_metrics.csv"
    command = [sys.executable, "-m", "fastppo.cli", str(tmp_path / "run.json")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + HANGS
        # Two rows and the header: by then the first row has been drawn.
        while not (rows.is_file() and rows.read_text().count("\n") >= 3):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert whole_picture(tmp_path / "metrics" / "training_curves.png")


@pytest.fixture
def drawings(monkeypatch):
    """The rows that each picture had; drawn in no time unless a test says how long."""
    made: list[int] = []

    def draw(rows: Any, path: Path, title: str) -> None:
        made.append(len(rows))
        path.write_bytes(PNG + END)

    monkeypatch.setattr(plots, "draw_curves", draw)
    return made


def test_pictures_are_drawn_with_what_is_logged_and_saved(config, drawings):
    settings = config(max_steps=5, ppo_epochs=1, logging_steps=2, save_steps=3)
    trainer.run(settings, check(settings))
    assert drawings == [2, 3, 4, 5]


@pytest.mark.alone
def test_a_slow_picture_slows_no_run(config, drawings, monkeypatch):
    """Twenty times what it took has to pass before the next one."""
    inner = plots.draw_curves

    def slow(*args: Any) -> None:
        time.sleep(1.0)
        inner(*args)

    monkeypatch.setattr(plots, "draw_curves", slow)
    settings = config(max_steps=4, ppo_epochs=1, save_strategy="no")
    trainer.run(settings, check(settings))
    assert drawings == [1, 4]


@pytest.mark.alone
@pytest.mark.parametrize("end", ["a failure", "a signal"])
def test_a_run_that_ends_early_has_a_picture_of_all_its_steps(
    config, drawings, monkeypatch, tmp_path, end
):
    inner = trainer.step_update

    def step_update(state: Any) -> Any:
        if state.step == 3:
            if end == "a failure":
                raise TrainingStopped("enough")
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(state)

    monkeypatch.setattr(trainer, "step_update", step_update)
    settings = config(max_steps=5, ppo_epochs=1, logging_steps=100, plot_loss=True)
    records = check(settings)
    with pytest.raises(TrainingStopped if end == "a failure" else Interrupted):
        trainer.run(settings, records)
    assert drawings == [3]
    assert whole_picture(tmp_path / "out" / "training_loss.png")
    left = [path.name for path in (tmp_path / "metrics").iterdir() if path.name.startswith(".")]
    assert left == []


class Service:
    """A stand-in for the modules wandb and trackio: runs, by identity, that outlive a process."""

    def __init__(self, key: str) -> None:
        self.key, self.runs = key, dict[str, list[int]]()
        self.module = types.ModuleType("service")
        self.module.init = self.init
        self.module.config = types.SimpleNamespace(update=lambda *_, **__: None)

    def init(self, *, project: str, name: str, resume: str = "never", **named: Any) -> Any:
        run = named.get(self.key, name)
        if run in self.runs and resume == "never":
            run = f"{run}-{len(self.runs)}"
        steps = self.runs.setdefault(run, [])

        def log(values: dict[str, Any], step: int, **_: Any) -> None:
            assert self.key != "name" or "step" not in values  # a word of trackio's own
            if "score" in values or "train/loss" in values:
                steps.append(step)

        nothing = types.SimpleNamespace(update=lambda *_, **__: None)
        return types.SimpleNamespace(
            name=run, log=log, config=nothing, finish=lambda: None, id=named.get("id")
        )


class Board:
    """TensorBoard's folders: a writer begins behind its purge_step."""

    requires_logging_directory = True
    folders: dict[str, list[int]]

    def __init__(self, run: str, folder: str, purge_step: int | None = None) -> None:
        self.steps = self.folders.setdefault(str(Path(folder) / run), [])
        if purge_step is not None:
            self.steps[:] = [step for step in self.steps if step < purge_step]

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int) -> None:
        if "score" in values or "train/loss" in values:
            self.steps.append(step)

    def finish(self) -> None:
        pass


@pytest.fixture
def services(monkeypatch):
    """wandb and trackio by stand-ins of their modules, TensorBoard by one of accelerate's class."""
    made = {"wandb": Service("id"), "trackio": Service("name")}
    for name, service in made.items():
        monkeypatch.setitem(sys.modules, name, service.module)
    monkeypatch.setattr(Board, "folders", {}, raising=False)
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Board)
    monkeypatch.setattr(preflight, "check_packages", lambda config: None)
    return made


def cut_off_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run dies as it begins the step after `step`, and nothing more is written."""
    inner = trainer.step_update

    def step_update(state: Any) -> Any:
        if state.step == step:
            raise KeyboardInterrupt
        return inner(state)

    monkeypatch.setattr(trainer, "step_update", step_update)


@pytest.mark.parametrize("saved", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_in_the_trackers_own_runs(config, services, monkeypatch, saved):
    """It died after step 3 with a checkpoint of step 2, or with none: then it begins again."""
    changes = {"save_steps": 2} if saved else {"save_strategy": "no"}
    names = ("wandb", "trackio", "tensorboard")
    settings = config(max_steps=4, ppo_epochs=1, report_to=",".join(names), **changes)
    records = check(settings)
    with monkeypatch.context() as patch:
        cut_off_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            trainer.run(settings, records)
    again = settings.model_copy(update={"resume_from_checkpoint": True})
    trainer.run(again, check(again))
    for service in services.values():
        (steps,) = service.runs.values()
        assert steps == [1, 2, 3, *range((saved or 0) + 1, 5)]  # the service drops what it has
    (steps,) = Board.folders.values()
    assert steps == [1, 2, 3, 4]


def test_a_new_run_gets_new_runs_in_the_trackers(config, services):
    settings = config(max_steps=1, ppo_epochs=1, report_to="wandb,trackio")
    trainer.run(settings, check(settings))
    again = settings.model_copy(update={"overwrite_output_dir": True})
    trainer.run(again, check(again))
    assert [len(service.runs) for service in services.values()] == [2, 2]


def test_stage_rm_goes_on_in_the_trackers_own_run_too(config, services, tmp_path, monkeypatch):
    pairs = [{"instruction": f"Say {i}", "chosen": "aeiou", "rejected": "xyz"} for i in range(10)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    settings = config(
        stage="rm",
        reward_model=None,
        reward_model_type="lora",
        dataset=str(tmp_path / "pairs.json"),
        max_steps=4,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_steps=2,
        report_to="wandb",
    )
    inner, calls = pair_trainer.pair_loss, [0]

    def dies(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return inner(*args)

    records = check(settings)
    with monkeypatch.context() as patch:
        patch.setattr(pair_trainer, "pair_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            reward_model.run(settings, records)
    again = settings.model_copy(update={"resume_from_checkpoint": True})
    reward_model.run(again, check(again))
    (steps,) = services["wandb"].runs.values()
    assert sorted(set(steps)) == [1, 2, 3, 4]
