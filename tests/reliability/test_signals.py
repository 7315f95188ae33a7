"""SIGTERM and Ctrl-C: saved at the next safe point, the shell's exit codes, and bit for bit on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from fastppo import durable
from tests.reliability import runs

pytestmark = pytest.mark.alone


def wait_for(found, seconds: float = 60.0) -> None:
    """Until a condition holds."""
    end = time.monotonic() + seconds
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
    assert durable.fault(newest) is None
    said = (rows.parents[1] / "said.txt").read_text()
    assert f"stopped by {number.name}; resume_from_checkpoint: true goes on from {newest}" in said
    # At once: not the end of the run, nor the next of save_steps.
    assert newest.name in (f"checkpoint-{after}", f"checkpoint-{after + 1}")
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


def test_a_second_signal_is_obeyed_at_once(settings):
    mine = settings("ppo")
    rows = Path(mine["metrics_dir"]) / "training_metrics.csv"
    process = runs.start(mine, runs.slow_steps, 30.0)
    wait_for((Path(mine["output_dir"]) / "fastppo_run.json").is_file)
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
    assert durable.fault(newest) is None
    assert f"goes on from {newest}" in (out.parent / "said.txt").read_text()
    code, said = runs.resume(mine)
    assert code == 0, said
    assert runs.differences(runs.result(mine), unbroken("rm")) == []
