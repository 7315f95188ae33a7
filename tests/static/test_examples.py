"""The examples that are no demo run as they stand."""

from __future__ import annotations

import re
import runpy
import tempfile
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
def test_the_ppo_trainer_learns_and_calls_back(capsys, monkeypatch, tmp_path):
    # 10 of its 30 steps, which take a minute.
    source = (EXAMPLES / "ppo_trainer.py").read_text(encoding="utf-8")
    short = tmp_path / "ppo_trainer.py"
    short.write_text(source.replace("max_steps=30", "max_steps=10"), encoding="utf-8")
    assert short.read_text(encoding="utf-8") != source
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(short), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"callback: after 320 responses the score is 0\.\d+", said)
    (before, after) = re.findall(r"reward (\S+) -> (\S+)\n", said)[-1]
    assert float(after) > float(before)
    assert (tmp_path / "ppo" / "adapter_model.safetensors").is_file()


def test_the_custom_loop_learns_and_its_trl_step_starts_at_ratio_1(capsys):
    runpy.run_path(str(EXAMPLES / "custom_loop.py"), run_name="__main__")
    said = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"epoch \d: loss (\S+)", said)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    # The policy that sampled is the one that trains, and advantages are whitened: mean 0.
    assert re.search(r"ppo/loss/policy -?0\.0000, .*clipfrac 0\.000", said)
