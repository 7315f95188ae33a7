"""The examples that are no demo run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_custom_loop_learns_and_its_trl_step_starts_at_ratio_1(capsys):
    runpy.run_path(str(EXAMPLES / "custom_loop.py"), run_name="__main__")
    said = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"epoch \d: loss (\S+)", said)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    # The policy that sampled is the one that trains, and advantages are whitened: mean 0.
    assert re.search(r"ppo/loss/policy -?0\.0000, .*clipfrac 0\.000", said)
