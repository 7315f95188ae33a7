"""No room: a file-size limit that the kernel enforces (EFBIG), and a device that is full (ENOSPC).

In each case the run says so in one line, exits with 1, and the last good checkpoint goes on.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fastppo.run import durable
from tests.reliability import runs

# First the adapter's small JSON fails, then the tokenizer's files, then weights, then moments.
LIMITS = [
    *(("ppo", nbytes) for nbytes in (0, 3_000, 12_000, 60_000)),
    *(("rm", nbytes) for nbytes in (0, 60_000)),
]


def check(mine, code, said):
    """One line, and every checkpoint that is there is whole."""
    assert code == 1, said
    (line,) = [line for line in said.splitlines() if line.startswith("fastppo-train:")]
    assert line.startswith(f"fastppo-train: stopped: no room to write below {mine['output_dir']} (")
    whole = durable.checkpoints(Path(mine["output_dir"]))
    assert all(durable.checkpoint_fault(folder) is None for folder in whole)
    assert f"{whole[-1]} is whole: free some space" in line
    assert "Traceback" not in said
    assert not list(Path(mine["output_dir"]).glob(".checkpoint-*"))


@pytest.mark.parametrize(("stage", "nbytes"), LIMITS)
def test_a_checkpoint_that_does_not_fit(settings, unbroken, stage, nbytes):
    mine = settings(stage)
    code, said = runs.run(mine, runs.limit_files, 2, nbytes)
    check(mine, code, said)
    code, said = runs.resume(mine)
    assert code == 0, said
    assert runs.differences(runs.result(mine), unbroken(stage)) == []


def test_metrics_that_do_not_fit(settings, unbroken):
    mine = settings("ppo")
    path = Path(mine["metrics_dir"]) / "training_metrics.csv"
    code, said = runs.run(mine, runs.full_device, 3, str(path))
    check(mine, code, said)
    assert "No space left on device" in said
    code, said = runs.resume(mine)
    assert code == 0, said
    assert runs.differences(runs.result(mine), unbroken("ppo")) == []


@pytest.mark.parametrize("nbytes", [0, 20_000])
def test_the_last_files_do_not_fit(settings, unbroken, nbytes):
    mine = settings("ppo")
    code, said = runs.run(mine, runs.limit_final, nbytes)
    check(mine, code, said)
    code, said = runs.resume(mine)
    assert code == 0, said
    assert runs.differences(runs.result(mine), unbroken("ppo")) == []
