"""The examples of other trainers, and the benchmark of them, give the same losses both ways."""

from __future__ import annotations

import json
import re
import sys

import pytest

from benchmarks import peers
from benchmarks.peers.environments import VERL
from tests import zoo
from tests.integrations.processes import run

pytestmark = pytest.mark.peers


def losses(printed: str) -> list[list[float]]:
    """The losses of both ways, as an example prints them."""
    found = re.findall(r"losses (.*?);.* in .*;  peak \d+ MiB", printed)
    return [[float(x) for x in row.split(", ")] for row in found]


def same_both_ways(printed: str, count: int) -> None:
    """Both ways print the same losses, which are not all the same number."""
    theirs, ours = losses(printed)
    assert len(theirs) == count
    assert len(set(theirs)) > 1
    assert ours == pytest.approx(theirs, abs=2e-5)


def test_grpo_trl(tmp_path):
    model = zoo.write("qwen2", tmp_path / "model")
    printed = run(sys.executable, "examples/grpo_trl.py", str(model), "2", path=peers.SITE)
    same_both_ways(printed, 2)


def test_openrlhf_loss():
    same_both_ways(run(sys.executable, "examples/openrlhf_loss.py", "2", path=peers.SITE), 4)


def test_verl_policy_loss():
    assert VERL.ready, "run: python -m benchmarks.peers.environments verl"
    same_both_ways(run(VERL.python, "examples/verl_policy_loss.py", "2"), 4)


def test_the_benchmark_compares_what_is_no_example(tmp_path):
    """A transformers model and Liger-Kernel's loss; exit code 1 if the losses are not the same."""
    out = tmp_path / "found.json"
    command = ("-m", "benchmarks", "integrations", "--quick", "--only", "transformers", "liger")
    run(sys.executable, *command, "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert [row["status"] for row in rows] == ["timed", "timed"]
    for row in rows:
        assert row["losses"]["ours"] == pytest.approx(row["losses"]["theirs"], rel=1e-4)
        assert len(set(row["losses"]["ours"])) == 2
        assert row["peak_mib"]["ours"] > 100
