"""SIGTERM and Ctrl-C: stopped and saved in seconds wherever a run is, and bit for bit on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from fastppo.run import durable
from tests.limits import HANGS
from tests.reliability import runs
from tests.reward_server import Reply

pytestmark = pytest.mark.alone


def wait_for(found) -> None:
    """Until a condition holds."""
    end = time.monotonic() + HANGS
    while not found():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.parametrize(
    ("number", "code", "after"), [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 3)]
)
def test_a_signal_in_stage_ppo(settings, unbroken, number, code, after):
    mine = settings("ppo")
    rows = Path(mine["metrics_dir"]) / "training_metrics.csv"
    process = runs.start(mine, runs.slow_steps, 0.1)
    wait_for(lambda: lines(rows) == 1 + after)
    os.kill(process.pid, number)
    assert runs.finish(process) == code
    newest = durable.checkpoints(Path(mine["output_dir"]))[-1]
    assert durable.checkpoint_fault(newest) is None
    said = (rows.parents[1] / "said.txt").read_text()
    assert f"stopped by {number.name}; resume_from_checkpoint: true goes on from {newest}" in said
    # At once: not the end of the run, nor the next of save_steps. A row is written within a step.
    assert newest.name == f"checkpoint-{after}"
    code, said = runs.resume(mine)
    assert code == 0, said
    assert runs.differences(runs.result(mine), unbroken("ppo")) == []


def test_a_signal_before_anything_was_learned(settings, unbroken):
    mine = settings("ppo")
    process = runs.start(mine, runs.slow_steps, 0.5)
    wait_for((Path(mine["output_dir"]) / "fastppo_run.json").is_file)
    os.kill(process.pid, signal.SIGTERM)
    assert runs.finish(process) == 143
    assert durable.checkpoints(Path(mine["output_dir"])) == []
    code, said = runs.resume(mine)
    assert code == 0, said
    assert "no checkpoint yet: the run starts from its beginning" in " ".join(said.split())
    assert runs.differences(runs.result(mine), unbroken("ppo")) == []


AT_ONCE = 2.0  # seconds in which a signal is obeyed
SAVING = 3.0  # beside it: the checkpoint, the picture and the end of a process on a busy machine


def stopped(settings, place, step, calls, expected, number=signal.SIGTERM):
    """Signal a run that is stuck in a place for a minute; it leaves the checkpoint expected."""
    out = Path(settings["output_dir"])
    seen = out.parent / "seen"
    process = runs.start(settings, runs.stuck, place, step, calls, str(seen))
    wait_for(seen.exists)
    began = time.monotonic()
    os.kill(process.pid, number)
    assert runs.finish(process, 30.0) == 128 + number
    assert time.monotonic() - began < AT_ONCE + SAVING
    newest = durable.checkpoints(out)[-1]
    assert (newest.name, durable.checkpoint_fault(newest)) == (expected, None)
    assert f"goes on from {newest}" in (out.parent / "said.txt").read_text()


# A step has four sequences of up to 8 tokens and, in two epochs, two optimiser steps.
@pytest.mark.parametrize(
    ("place", "step", "calls", "expected"),
    [
        ("a token", 3, 2, "checkpoint-2"),
        ("scoring", 4, 1, "checkpoint-3"),
        ("a reward function", 2, 1, "checkpoint-1"),
        ("the update", 2, 1, "checkpoint-1"),  # between two optimiser steps
        ("the update", 4, 2, "checkpoint-3"),  # after the last one
        ("an evaluation", 3, 1, "checkpoint-3"),  # of the reference, once
        ("an evaluation", 3, 2, "checkpoint-3"),
        ("an evaluation", 5, 1, "checkpoint-5"),  # the last one, after the last step
    ],
)
def test_a_step_is_dropped_wherever_the_signal_comes(
    settings, unbroken, place, step, calls, expected
):
    mine = settings("ppo", save_strategy="no" if step == 4 else "steps")
    stopped(mine, place, step, calls, expected)
    code, said = runs.resume({**mine, "save_strategy": "steps"})
    assert code == 0, said
    assert runs.differences(runs.result(mine), unbroken("ppo")) == []


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        (6, "checkpoint-2"),  # the third step's second micro-batch
        (7, "checkpoint-3"),  # the fourth's, of which no checkpoint is due before
        (8, "checkpoint-4"),  # an evaluation, which the resumed run makes up for
        (9, "checkpoint-4"),  # the second epoch's first micro-batch
    ],
)
def test_a_step_of_stage_rm_is_dropped_too(settings, unbroken, calls, expected):
    mine = settings("rm")
    stopped(mine, "a pair", 0, calls, expected)
    code, said = runs.resume(mine)
    assert code == 0, said
    assert runs.differences(runs.result(mine), unbroken("rm")) == []


def test_a_reward_server_that_hangs_holds_no_signal_up(settings, server):
    """Blocked in a read of its socket, under a timeout of ten minutes."""
    mine = settings(
        "ppo",
        reward_model=server.url,
        reward_model_type="api",
        reward_api_timeout=600,
        eval_strategy="no",
        eval_judge=None,
    )
    server.script = [*[Reply()] * 5, Reply(pause=20.0)]  # one before the run, two a step
    process = runs.start(mine)
    wait_for(lambda: len(server.seen) == 6)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    assert runs.finish(process, 30.0) == 143
    assert time.monotonic() - began < AT_ONCE + SAVING
    assert durable.checkpoints(Path(mine["output_dir"]))[-1].name == "checkpoint-2"


def test_a_second_signal_is_obeyed_at_once(settings):
    mine = settings("ppo")
    rows = Path(mine["metrics_dir"]) / "training_metrics.csv"
    process = runs.start(mine, runs.slow_save, 30.0)
    wait_for(lambda: lines(rows) == 2)
    said = rows.parents[1] / "said.txt"
    os.kill(process.pid, signal.SIGTERM)
    wait_for(lambda: "saves and stops soon" in said.read_text())
    os.kill(process.pid, signal.SIGTERM)
    assert runs.finish(process, 10.0) == -signal.SIGTERM


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_stage_rm(settings, unbroken, number, code):
    mine = settings("rm")
    out = Path(mine["output_dir"])
    process = runs.start(mine, runs.slow_pairs, 0.05)
    wait_for((out / "checkpoint-2").is_dir)
    os.kill(process.pid, number)
    assert runs.finish(process) == code
    newest = durable.checkpoints(out)[-1]
    assert durable.checkpoint_fault(newest) is None
    assert f"goes on from {newest}" in (out.parent / "said.txt").read_text()
    code, said = runs.resume(mine)
    assert code == 0, said
    assert runs.differences(runs.result(mine), unbroken("rm")) == []
