"""Signals: noted once, obeyed at a safe point, saved, and the exit code that shells know."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from fastppo import checkpoint, durable, trainer
from fastppo.cli import main
from fastppo.errors import Interrupted
from fastppo.stopping import Stop

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


def test_what_is_ignored_stays_ignored():
    """As in a shell's background job, where Ctrl-C is for somebody else."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            stop.check()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("phase", ["sampled", "scored"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
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
    assert durable.fault(folder) is None
    assert main([str(tmp_path / "run.json"), "resume_from_checkpoint=true"]) == 0
    rows = (tmp_path / "metrics" / "training_metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3"]


def test_a_signal_in_the_update_is_obeyed_after_it(state, tmp_path):
    run = trainer.step_update(state())
    run.stop.signal = signal.SIGTERM
    with pytest.raises(Interrupted):
        trainer.step_update(run)
    assert run.step == 1
    stopped = checkpoint.save_and_stop(run, Interrupted(signal.SIGTERM), tmp_path)
    assert str(tmp_path / "checkpoint-1") in str(stopped)
    again = state()
    assert checkpoint.resume(again, tmp_path / "checkpoint-1") == []
