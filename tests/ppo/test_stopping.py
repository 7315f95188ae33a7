"""Signals: obeyed at once, the step dropped, saved, and the exit code that shells know."""

from __future__ import annotations

import csv
import functools
import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fastppo import toy
from fastppo.cli import main
from fastppo.errors import Interrupted
from fastppo.ppo import checkpoint, evaluation, sampling, score, trainer, update
from fastppo.run import durable
from fastppo.run.stopping import Stop
from tests.tiers import slow_unless

pytestmark = pytest.mark.alone


def test_the_first_signal_waits_for_check_and_the_second_does_not(capfd):
    before = signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted) as caught:
            stop.check()
        assert caught.value.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err.count("SIGINT: saves and stops soon") == 1


def test_inside_at_once_a_signal_ends_what_blocks_and_what_catches_every_failure():
    def stubborn(stop: Stop) -> None:
        with stop, stop.at_once():
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            try:
                time.sleep(30)
            except Exception:  # as a reward function may
                time.sleep(30)

    began = time.monotonic()
    with pytest.raises(Interrupted):
        stubborn(Stop())
    assert time.monotonic() - began < 20, "neither sleep was waited for"


def test_a_signal_whose_exception_is_lost_counts_at_the_end_of_the_block():
    went_on: list[bool] = []

    def swallowing(stop: Stop) -> None:
        with stop, stop.at_once():
            with suppress(BaseException):
                os.kill(os.getpid(), signal.SIGTERM)
            went_on.append(True)

    with pytest.raises(Interrupted):
        swallowing(Stop())
    assert went_on == [True]


def test_what_is_ignored_stays_ignored():
    """As in a shell's background job, where Ctrl-C is for somebody else."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            stop.check()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "code", "phase"),
    slow_unless(
        lambda number, code, phase: (number == signal.SIGTERM) == (phase == "sample"),
        [
            (signal.SIGTERM, 143, "sample"),
            (signal.SIGTERM, 143, "score"),
            (signal.SIGINT, 130, "sample"),
            (signal.SIGINT, 130, "score"),
        ],
    ),
)
def test_a_signal_within_a_step_saves_the_step_before_it(
    config, tmp_path, monkeypatch, capfd, phase, number, code
):
    """The step that was begun is dropped, its random numbers given back."""
    settings = config(max_steps=3, ppo_score_norm=True)
    inner, calls = getattr(trainer, phase), []

    def interrupted(*args, **kwargs):
        calls.append(phase)
        if len(calls) == 2:
            torch.rand(7)
            os.kill(os.getpid(), number)
        return inner(*args, **kwargs)

    monkeypatch.setattr(trainer, phase, interrupted)
    (tmp_path / "run.json").write_text(json.dumps(settings.model_dump(exclude_none=True)))
    assert main([str(tmp_path / "run.json")]) == code
    folder = tmp_path / "out" / "checkpoint-1"
    line = f"stopped by {number.name}; resume_from_checkpoint: true goes on from {folder}\n"
    assert line in capfd.readouterr().err
    assert durable.checkpoint_fault(folder) is None
    assert main([str(tmp_path / "run.json"), "resume_from_checkpoint=true"]) == 0
    rows = (tmp_path / "metrics" / "training_metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3"]


PLACES = {
    "a token": (sampling.Draws, "draw"),
    "scoring": (score, "token_scores"),
    "the reward": (toy, "vowels"),
    "an optimiser step": (update, "clip_and_step"),
    "an evaluation": (evaluation, "answer"),
}


class Signal:
    """SIGTERM once, in call `at` of a place in PPO step `step`, when that has done its work."""

    def __init__(self, monkeypatch, place: str, step: int, at: int) -> None:
        self.step, self.at, self.now, self.calls = step, at, 0, 0
        owner, name = PLACES[place]
        inner, inner_step = getattr(owner, name), trainer.step_update

        def step_update(state):
            self.now, self.calls = state.step + 1, 0
            return inner_step(state)

        @functools.wraps(inner)  # a reward function gets what it takes
        def called(*args, **kwargs):
            self.calls += 1
            result = inner(*args, **kwargs)
            if (self.now, self.calls) == (self.step, self.at):
                torch.rand(7)
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        monkeypatch.setattr(trainer, "step_update", step_update)
        monkeypatch.setattr(owner, name, called)


def left(folder: Path) -> dict[str, object]:
    """Weights, heads, rows and samples of a run, without what a clock says."""
    found = {
        path.relative_to(folder / "out").as_posix(): path.read_bytes()
        for path in (folder / "out").rglob("*.safetensors")
        if "checkpoint" not in path.as_posix()
    }
    with (folder / "metrics" / "training_metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found["rows"] = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    found["samples"] = (folder / "metrics" / "samples.json").read_text()
    return found


def running(config, folder: Path) -> list[str]:
    """The arguments of a run of three steps, with all in it that a dropped step could leave."""
    (folder / "run.json").parent.mkdir(exist_ok=True)
    settings = config(
        output_dir=str(folder / "out"),
        metrics_dir=str(folder / "metrics"),
        max_steps=3,
        ppo_score_norm=True,
        horizon=50,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_steps=2,
        eval_max_samples=2,
        save_steps=50,
    )
    (folder / "run.json").write_text(json.dumps(settings.model_dump(exclude_none=True)))
    return [str(folder / "run.json")]


@pytest.fixture(scope="module")
def unbroken():
    return {}


@pytest.mark.parametrize(
    ("place", "step", "at", "expected"),
    slow_unless(
        lambda place, step, *_: step == 2 and place != "the reward",
        [
            ("a token", 2, 3, 1),
            ("scoring", 3, 1, 2),
            ("the reward", 2, 1, 1),
            ("an optimiser step", 2, 1, 1),  # of two: the weights have moved
            ("an optimiser step", 3, 2, 2),  # of two: the update is done, the step is not
            ("an evaluation", 2, 1, 2),
            ("an evaluation", 3, 1, 3),  # the last, when all steps are done
        ],
    ),
)
def test_a_signal_drops_the_step_at_once_and_a_resume_is_the_unbroken_run(
    config, tmp_path, monkeypatch, capfd, unbroken, place, step, at, expected
):
    if not unbroken:
        assert main(running(config, tmp_path / "unbroken")) == 0
        unbroken.update(left(tmp_path / "unbroken"))
    arguments = running(config, tmp_path / "cut")
    with monkeypatch.context() as patch:
        sent = Signal(patch, place, step, at)
        assert main(arguments) == 143
    assert sent.calls == at  # nothing of the kind ran after the signal
    (kept,) = durable.checkpoints(tmp_path / "cut" / "out")
    assert (kept.name, durable.checkpoint_fault(kept)) == (f"checkpoint-{expected}", None)
    assert f"stopped by SIGTERM; resume_from_checkpoint: true goes on from {kept}" in (
        capfd.readouterr().err
    )
    assert main([*arguments, "resume_from_checkpoint=true"]) == 0
    found = left(tmp_path / "cut")
    assert [name for name in unbroken if found[name] != unbroken[name]] == []


def test_without_a_handler_no_copy_is_made_and_one_that_is_too_large_is_not(state, monkeypatch):
    run = trainer.step_update(state())
    assert not run.snapshot.copies
    monkeypatch.setattr("fastppo.ppo.snapshot.SHARE", 0.0)
    with run.stop:
        assert trainer.step_update(run).step == 2
    assert not run.snapshot.copies


def test_an_update_of_which_there_is_no_copy_is_finished_first(state, monkeypatch):
    """What trains is larger than the host: there is nothing to go back to."""
    monkeypatch.setattr("fastppo.ppo.snapshot.SHARE", 0.0)
    run, inner = state(), update.clip_and_step

    def signalled(*args, **kwargs):
        if run.stop.signal is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*args, **kwargs)

    monkeypatch.setattr(update, "clip_and_step", signalled)
    with run.stop:
        trainer.step_update(run)
        assert run.step == len(run.metrics.rows) == 1
        assert run.metrics.rows[0]["optimizer_steps"] == 2
        with pytest.raises(Interrupted):
            trainer.step_update(run)


def test_a_dropped_update_leaves_weights_moments_and_counts_as_they_were(state, monkeypatch):
    """In the first step the optimiser has no state yet; in the second it has."""
    run, inner = state(ppo_score_norm=True), update.clip_and_step

    def signalled(*args, **kwargs):
        result = inner(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    def everything():
        tree = [run.optimizer.state_dict()["state"], vars(run.running_score)]
        return [p.detach().clone() for p in checkpoint.trainable_parameters(run)], json.loads(
            json.dumps(tree, default=lambda tensor: tensor.tolist())
        )

    for _ in range(2):
        weights, state_before = everything()
        run.stop = Stop()
        with monkeypatch.context() as patch, run.stop:
            patch.setattr(update, "clip_and_step", signalled)
            with pytest.raises(Interrupted):
                trainer.step_update(run)
        after, state_after = everything()
        assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
        assert state_after == state_before
        run.stop = Stop()
        trainer.step_update(run)
