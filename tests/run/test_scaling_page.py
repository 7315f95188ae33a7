"""Every command of docs/scaling.md, run on this machine's CPU with two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import HANGS
from tests.reliability import runs
from tests.world import free_port

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
BLOCKS = [block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S)]
# Lines that belong together are one case: the machines of a run.
COMMANDS = [
    lines
    for block in BLOCKS
    for lines in ([block] if "--nnodes" in block[0] else [[line] for line in block])
    if "fastppo.launch.ray" not in lines[0]  # tests/peers/test_ray.py runs these
]


def test_the_page_shows_every_way_to_start_a_run():
    text = "\n".join(line for block in BLOCKS for line in block)
    ways = ("torchrun", "accelerate launch", "--nnodes 2", "--no-python", "--gpus 4", "fsdp=")
    for words in ways:
        assert words in text


@pytest.mark.slow
@pytest.mark.parametrize("lines", COMMANDS, ids=lambda lines: lines[0][:40])
def test_a_command_runs(tmp_path, lines):
    settings = runs.ppo(
        tmp_path / "run",
        max_steps=1,
        eval_strategy="no",
        save_strategy="no",
        use_cpu=True,
        reward_model="fastppo.toy:vowels",
        eval_judge="fastppo.toy:vowels",
    )
    runs.write_once(tmp_path / "run" / "run.json", settings)
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    port, started = free_port(), []
    for line in lines:
        for pattern, here in (
            (r"ppo\.yaml", str(tmp_path / "run" / "run.json")),
            (r"(--nproc-per-node|--num_processes) 4", rf"\1 {1 if len(lines) == 2 else 2}"),
            ("host-of-rank-0", "127.0.0.1"),
            ("29500", str(port)),
            ("--gpus 4", "--gpus 2"),
        ):
            line = re.sub(pattern, here, line)
        if line.startswith("torchrun") and "--nnodes" not in line:
            line = line.replace("torchrun", f"torchrun --master-port {port}", 1)
        if line.startswith("accelerate"):
            line = line.replace("launch", f"launch --main_process_port {port}", 1)
        started.append(
            subprocess.Popen(
                line.split(),
                cwd=tmp_path,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    said = [process.communicate(timeout=HANGS)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(lines), "\n".join(said)
    if "--plan" in lines[0]:
        return
    assert "stage ppo" in said[0]
    assert said[0].count("[bold]fastppo") + said[0].count("stage ppo,") == 1, (
        "the first alone talks"
    )
    assert (tmp_path / "run" / "out" / "adapter_model.safetensors").is_file()
    rows = (tmp_path / "run" / "metrics" / "training_metrics.csv").read_text().splitlines()
    assert len(rows) == 2
