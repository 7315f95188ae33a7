"""TRL 1.16's GRPOTrainer with our output head gives TRL's losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import zoo

pytestmark = [pytest.mark.peers]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    zoo.write("gemma2", folder / "model")  # with a softcap on its logits
    return folder


def run(folder: Path, which: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.integrations.trl_run", str(folder), which]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_losses_over_20_steps(folder):
    """With an entropy bonus, a KL and two passes over each batch; gradients show in the norm.

    A head whose temperature is off by 1e-3 is told apart.
    """
    found = {}
    for which in ("theirs", "ours", "disturbed"):
        done = run(folder, which)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith(('[{"', '{"mod'))]
        names, found[which] = lines
        assert names["modules"] >= 2  # the one that has the function, and the trainer's
        assert (names["replaced"], names["restored"]) == (which != "theirs", True)
    assert len(found["ours"]) == 20
    assert any(abs(row["loss"]) > 1e-3 for row in found["theirs"])
    expected = [pytest.approx(row, rel=1e-4, abs=1e-5) for row in found["theirs"]]
    assert found["ours"] == expected
    assert sum(row != same for row, same in zip(found["disturbed"], expected, strict=True)) > 10


def test_a_trainer_that_was_there_before_is_said_to_be_late(folder):
    done = run(folder, "late")
    assert done.returncode == 1
    assert "no trainer with TRL's fused output head was constructed inside the block" in done.stderr
