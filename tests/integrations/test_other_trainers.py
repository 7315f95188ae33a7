"""The examples of other trainers, and the benchmark of them, give the same numbers both ways."""

from __future__ import annotations

import json
import re
import sys

import pytest

from benchmarks import integrations, peers
from benchmarks.peers.environments import VERL
from tests import zoo
from tests.integrations.processes import run

pytestmark = pytest.mark.peers


def same_both_ways(printed: str, steps: int, *names: str) -> None:
    """Both ways print the same numbers, which are no rounding around 0, and losses change."""
    found = re.findall(r"^  (.+?) *((?: -?[\d.]+)+)$", printed, re.MULTILINE)
    series = [(name, [float(x) for x in row.split()]) for name, row in found]
    count = len(names)
    assert [name for name, _ in series] == [*names, *names]
    for (name, theirs), (_, ours) in zip(series[:count], series[count:], strict=True):
        assert len(theirs) == steps
        assert len(set(theirs)) > 1 or name == "entropy"  # which a few steps hardly change
        assert max(map(abs, theirs)) > 1e-3
        assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-5)
    (last,) = re.findall(r"share of the median: (.*)", printed)
    assert [part.rpartition(" ")[0] for part in last.split(", ")] == list(names)
    assert all(float(part.rpartition(" ")[2]) < 1e-4 for part in last.split(", "))


def test_grpo_trl(tmp_path):
    model = zoo.write("qwen2", tmp_path / "model")
    # Of 3 steps two have losses near 0, and their median would be rounding's.
    printed = run(sys.executable, "examples/grpo_trl.py", str(model), "8", path=peers.SITE)
    same_both_ways(printed, 8, "loss", "grad_norm", "kl", "entropy")


def test_openrlhf_loss():
    printed = run(sys.executable, "examples/openrlhf_loss.py", "2", path=peers.SITE)
    same_both_ways(printed, 2, "policy loss", "value loss", "grad_norm")


def test_verl_policy_loss():
    assert VERL.ready, "run: python -m benchmarks.peers.environments verl"
    printed = run(VERL.python, "examples/verl_policy_loss.py", "2")
    same_both_ways(printed, 2, "loss", "entropy", "grad_norm")


def test_the_benchmark_compares_what_is_no_example(tmp_path):
    """A transformers model and Liger-Kernel's loss; exit code 1 if they are not the same."""
    out = tmp_path / "found.json"
    command = ("-m", "benchmarks", "integrations", "--quick", "--only", "transformers", "liger")
    run(sys.executable, *command, "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert [row["status"] for row in rows] == ["timed", "timed"]
    for row in rows:
        assert "grad_norm" in row["compared"]
        for each in row["compared"].values():
            assert each["ours"] == pytest.approx(each["theirs"], rel=1e-4)
            assert len(set(each["ours"])) == integrations.QUICK
        assert row["peak_mib"]["ours"] > 100
