"""Several processes, one of which dies or does not come: the others end with a line each, the last
checkpoint is whole, and the run that goes on from it is the unbroken one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastppo.run import durable
from tests import world
from tests.limits import HANGS
from tests.reliability import dying, runs
from tests.reliability.test_signals import lines, wait_for

pytestmark = pytest.mark.alone
LOST = "has lost another, which has ended, or has not answered"
EXACT = {"reward_model": "fastppo.toy:vowels", "eval_judge": "fastppo.toy:vowels"}


@pytest.fixture(scope="module")
def together(home: Path) -> Callable[..., dict[str, Any]]:
    """The settings of a run of several processes that nobody disturbs, by stage and number."""
    known: dict[tuple[str, int, bool], dict[str, Any]] = {}

    def get(stage: str, size: int, *, exact: bool = False) -> dict[str, Any]:
        if (stage, size, exact) not in known:
            changes = {} if stage == "rm" or not exact else EXACT
            folder = home / f"together-{stage}-{size}-{exact}"
            known[stage, size, exact] = {"ppo": runs.ppo, "rm": runs.rm}[stage](folder, **changes)
            codes, said = world.run(known[stage, size, exact], size)
            assert codes == [0] * size, said
        return known[stage, size, exact]

    return get


def newest(settings: dict[str, Any]) -> str:
    """The name of the newest checkpoint, which has to be whole."""
    found = durable.checkpoints(Path(settings["output_dir"]))[-1]
    assert durable.checkpoint_fault(found) is None
    return found.name


def resumed(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "resume_from_checkpoint": True}


@pytest.mark.parametrize(
    ("stage", "who", "place", "step", "left"),
    [
        ("ppo", 1, "sampling", 3, "checkpoint-2"),
        ("ppo", 0, "scoring", 3, "checkpoint-2"),
        ("ppo", 1, "the reduce", 3, "checkpoint-2"),
        ("ppo", 0, "the save", 4, "checkpoint-2"),
        ("ppo", 1, "waiting for the save", 4, "checkpoint-4"),
        ("rm", 1, "a pair", 9, "checkpoint-6"),
    ],
)
def test_a_process_that_is_killed_ends_the_others_soon(
    settings, together, stage, who, place, step, left
):
    mine = settings(stage)
    began = time.monotonic()
    codes, said = world.run(mine, 2, dying.ends, who, place, step)
    assert time.monotonic() - began < HANGS, "ddp_timeout is 1800"
    assert codes[who] == -signal.SIGKILL
    assert codes[1 - who] == 1
    assert said.count(LOST) == 1, said
    assert "Traceback" not in said
    assert newest(mine) == left
    codes, said = world.run(resumed(mine), 2)
    assert codes == [0, 0], said
    assert runs.differences(runs.result(mine), runs.result(together(stage, 2))) == []


def test_a_process_that_does_not_come_is_given_up_after_the_timeout(settings):
    mine = settings("ppo", ddp_timeout=10)
    first, second = world.start(mine, 2, dying.ends, 1, "scoring", 3, dying.hang)
    assert runs.finish(first) == 1
    second.kill()
    runs.finish(second)
    said = Path(mine["output_dir"]).parent.joinpath("said.txt").read_text(encoding="utf-8")
    assert f"{LOST} for 10 s (ddp_timeout)" in said
    assert newest(mine) == "checkpoint-2"


def test_a_signal_to_all_is_a_stop_of_the_run(settings, together):
    """As a launcher sends it; no process asks another, and the first saves the last whole step."""
    mine = settings("ppo")
    rows = Path(mine["metrics_dir"]) / "training_metrics.csv"
    processes = world.start(mine, 2, slow)
    wait_for(lambda: lines(rows) == 1 + 3)
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    assert [runs.finish(process) for process in processes] == [143, 143]
    assert newest(mine) == "checkpoint-3"
    codes, said = world.run(resumed(mine), 2)
    assert codes == [0, 0], said
    assert runs.differences(runs.result(mine), runs.result(together("ppo", 2))) == []


def slow(rank: int) -> None:
    runs.slow_steps(0.3)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_processes_goes_on_with_the_run(settings, together, before, after):
    mine = settings("ppo", **EXACT)
    codes, _ = world.run(mine, before, dying.ends, 0, "sampling", 4)
    assert codes[0] == -signal.SIGKILL
    codes, said = world.run(resumed(mine), after)
    assert codes == [0] * after, said
    assert "not bit for bit, for these changed since: the number of processes" in " ".join(
        said.split()
    )
    wanted = together("ppo", 1, exact=True)
    ours, theirs = (
        load_file(Path(each["output_dir"]) / "adapter_model.safetensors") for each in (mine, wanted)
    )
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, atol=1e-5, rtol=1e-4)
    ours, theirs = (runs.result(each) for each in (mine, wanted))
    assert len(ours["rows"]) == len(theirs["rows"]) == 5
    for row, one in zip(ours["rows"], theirs["rows"], strict=True):
        for key in ("score", "kl", "beta", "response_length", "policy_loss"):
            if key in one:
                assert float(row[key]) == pytest.approx(float(one[key]), rel=1e-3, abs=1e-5), key


def unlike(rank: int, who: int, what: str) -> None:
    """Process `who` is started with another key, or reads other data."""
    import fastppo.config
    import fastppo.run.preflight as preflight

    if rank != who:
        return
    load, read = fastppo.config.load_config, preflight.read_records
    if what == "seed":
        fastppo.config.load_config = lambda file, words: load(file, [*words, "seed=8"])
    else:

        def fewer(config: Any) -> Any:
            records = read(config)
            records.train.pop()
            return records

        preflight.read_records = fewer


@pytest.mark.parametrize("what", ["seed", "data"])
@pytest.mark.parametrize("stage", ["ppo", "rm"])
def test_processes_that_were_started_unlike_are_named(settings, stage, what):
    mine = settings(stage)
    codes, said = world.run(mine, 2, unlike, 1, what)
    assert codes == [2, 2], said
    line = re.search(r"process 1 of 2 has another (.*?) than process 0; start all of them", said)
    # A new adapter and the pairs that are held out are drawn by the seed: they differ with it.
    also = ["weights", "data"][: 1 + (stage == "rm")] if what == "seed" else []
    assert line[1].split(", ") == [what, *also]
    assert not Path(mine["output_dir"]).exists()


def torchrun(module: str, settings: dict[str, Any], **environment: str) -> tuple[int, str]:
    """A run of two processes under torchrun's agent."""
    command = ["torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", module]
    file = Path(settings["output_dir"]).parent / "run.json"
    words = [f"{key}=true" for key in ("resume_from_checkpoint",) if key in settings]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(file), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )
    return done.returncode, done.stdout + done.stderr


def test_torchruns_agent_ends_the_others_and_the_run_goes_on(settings, together):
    mine = settings("ppo")
    runs.write_once(Path(mine["output_dir"]).parent / "run.json", mine)
    code, said = torchrun("tests.reliability.dying", mine, DIES="1 3 sampling")
    assert code == 1, said
    assert newest(mine) == "checkpoint-2"
    code, said = torchrun("fastppo", resumed(mine))
    assert code == 0, said
    found, wanted = runs.result(mine), runs.result(together("ppo", 2))
    for each in (found, wanted):  # PEFT writes a set, whose order each Python draws anew
        each["adapter_config.json"]["target_modules"].sort()
    assert runs.differences(found, wanted) == []
