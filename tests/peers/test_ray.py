"""Ray itself, on this machine: two workers run the toy, lose one, and end as they would have.

The workers talk over gloo. An environment of its own has Ray; the rest is this one's.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.environments import RAY
from fastppo.run import durable
from tests import world
from tests.reliability import runs

pytestmark = pytest.mark.peers
ROOT = Path(__file__).resolve().parents[2]
REWARD = "tests.peers.ray_reward:vowels"
KEYS = {"reward_model": REWARD, "eval_judge": "fastppo.toy:vowels", "use_cpu": True}
# The driver writes another file than the workers look for, as on a folder that they do not share.
ELSEWHERE = """
import sys
from fastppo.launch import ray, ray_worker
ray_worker.token_file = lambda folder, token: folder / "elsewhere"
sys.exit(ray.main())
"""


def start(settings: dict[str, Any], *words: str, how: tuple[str, ...], **more: str) -> Any:
    """The command on two workers, from the folder of its file."""
    assert RAY.ready, "run: python -m benchmarks.peers.environments ray"
    folder = Path(settings["output_dir"]).parent
    runs.write_once(folder / "run.json", settings)
    return subprocess.Popen(
        [RAY.python, *how, "run.json", "--workers", "2", *words],
        cwd=folder,
        env={
            **{name: x for name, x in os.environ.items() if not name.startswith("RAY_")},
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "RUN_OF": str(folder),  # by which its processes are known
            **more,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(
    settings: dict[str, Any],
    *words: str,
    how: tuple[str, ...] = ("-m", "fastppo.launch.ray"),
    **more: str,
) -> tuple[int, str]:
    """Exit code and all that reached the driver's terminal."""
    process = start(settings, *words, how=how, **more)
    try:
        said = process.communicate(timeout=400)[0]
    finally:
        process.kill()
    return process.returncode, said


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def unbroken(home: Path) -> dict[str, Any]:
    """What two processes leave that torchrun's variables have started, and nobody disturbs."""
    settings = runs.ppo(home / "unbroken", **KEYS)
    codes, said = world.run(settings, 2)
    assert codes == [0, 0], said
    return result(settings)


def result(settings: dict[str, Any]) -> dict[str, Any]:
    found = runs.result(settings)
    found["adapter_config.json"]["target_modules"].sort()  # a set, in each Python's own order
    return found


def relative(folder: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a run, and its file with relative paths, as users write them."""
    settings = runs.ppo(folder, **KEYS, **changes)
    inside = {
        key: x.replace(str(folder) + "/", "").replace(str(folder.parent), "..")
        for key, x in settings.items()
        if isinstance(x, str)
    }
    runs.write_once(folder / "run.json", {**settings, **inside})
    return settings


def dies(settings: dict[str, Any], rank: int, step: int) -> str:
    return f"{rank} {step} {Path(settings['output_dir']).parent}"


def test_a_lost_worker_is_replaced_and_the_run_ends_as_the_unbroken_one(home, unbroken):
    mine = relative(home / "lost")
    code, said = run(mine, DIES=dies(mine, 1, 3))
    assert code == 0, said
    assert (home / "lost" / "died").exists()
    assert runs.differences(result(mine), unbroken) == []
    # On the driver's terminal: the failure, where the run goes on, the lines of process 0 alone.
    assert len(re.findall(r"fastppo\.launch\.ray: failure 1 of 3: worker ", said)) == 1, said
    assert re.search(r"resumes after step 2 from \S+checkpoint-2", " ".join(said.split())), said
    assert said.count("stage ppo,") == 2, "process 0 of either start"
    assert "step 5" in said
    assert f"fastppo.launch.ray: finished; {mine['output_dir']}" in said
    # Ray's own storage has pointers alone.
    sizes = [path.stat().st_size for path in (home / "lost/out/ray").rglob("*") if path.is_file()]
    assert sum(sizes) < 20_000


def test_failures_that_were_used_up_are_exit_code_1_and_the_run_can_go_on(home, unbroken):
    mine = relative(home / "used-up")
    code, said = run(mine, "--max-failures", "0", DIES=dies(mine, 0, 3))
    assert code == 1, said
    lines = [line for line in said.splitlines() if line.startswith("fastppo.launch.ray: stopped")]
    assert len(lines) == 1, said
    assert "--max-failures 0" in lines[0]
    assert "resume_from_checkpoint: true goes on" in lines[0]
    assert durable.checkpoints(home / "used-up/out")[-1].name == "checkpoint-2"
    code, said = run(mine, "resume_from_checkpoint=true")
    assert code == 0, said
    assert runs.differences(result(mine), unbroken) == []


def test_storage_that_the_workers_do_not_share_is_a_line_and_nothing_is_written(home):
    mine = relative(home / "not-shared")
    code, said = run(mine, how=("-c", ELSEWHERE))
    assert code == 2, said
    lines = [line for line in said.splitlines() if line.startswith("fastppo.launch.ray: error: ")]
    assert len(lines) == 1, said
    assert "is not the driver's folder: name one on a file system" in lines[0]
    assert "failure 1" not in said, "another start would find the same"
    assert not Path(mine["output_dir"]).exists()


def test_ctrl_c_ends_driver_and_workers(home):
    mine = relative(home / "interrupted", max_steps=500)
    process = start(mine, how=("-m", "fastppo.launch.ray"))
    out = Path(mine["output_dir"])
    wait_for(lambda: any(out.glob("checkpoint-*")) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130, said
    assert "fastppo.launch.ray: stopped by SIGINT; resume_from_checkpoint: true goes on" in said
    newest = durable.checkpoints(out)[-1]
    assert durable.checkpoint_fault(newest) is None
    wait_for(lambda: not workers(out))


def workers(folder: Path) -> list[str]:
    """The processes that the run has started, by their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "environ").read_bytes()
        except OSError:
            continue
        if f"RUN_OF={folder.parent}".encode() in words.split(b"\0"):
            found.append(place.name)
    return found


def wait_for(done: Callable[[], bool], seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.2)
