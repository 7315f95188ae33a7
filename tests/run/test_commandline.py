"""Commands whose text goes to a reader that leaves early, as `head` does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SIGPIPE = 13


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("option", ["--plan", "--explain"])
def test_a_reader_that_leaves_early_ends_the_text_without_a_traceback(tmp_path, option, unbuffered):
    config = tmp_path / "ppo.yaml"
    config.write_text(
        "stage: ppo\nmodel_name_or_path: Qwen/Qwen2.5-7B\nreward_model: x\n"
        "dataset: x\ntemplate: qwen\noutput_dir: saves/x\n"
    )
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fastppo.cli", str(config), option]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    try:
        done = subprocess.run(
            command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (128 + SIGPIPE, "")
