"""A checkpoint that an earlier version wrote is resumed, and its run goes on as it did there.

tests/fixtures/earlier_checkpoint has `checkpoint-2` of a run of the tiny model, and the
training_metrics.csv that the same earlier version wrote when it resumed from there up to step 4.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from fastppo.ppo import trainer
from fastppo.run import durable
from fastppo.run.preflight import check

EARLIER = Path(__file__).resolve().parents[1] / "fixtures" / "earlier_checkpoint"


def rows_in(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file, without its clocks."""
    with path.open(encoding="utf-8") as file:
        return [
            {name: float(cell) for name, cell in row.items() if "second" not in name}
            for row in csv.DictReader(file)
        ]


def test_a_checkpoint_of_an_earlier_version_goes_on_as_it_did_there(config, tmp_path, capsys):
    """The step after it has the same rollout, losses and gradients, to rounding."""
    shutil.copytree(EARLIER / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    assert durable.checkpoint_fault(tmp_path / "out" / "checkpoint-2") is None
    settings = config(lora_rank=4, max_steps=4, save_steps=2, resume_from_checkpoint=True)
    trainer.run(settings, check(settings))
    assert "resumes after step 2" in capsys.readouterr().out
    expected = rows_in(EARLIER / "training_metrics.csv")
    found = rows_in(tmp_path / "metrics" / "training_metrics.csv")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert found[:2] == expected[:2]  # they are in the checkpoint
    for row, earlier in zip(found[2:], expected[2:], strict=True):
        assert row == pytest.approx(earlier, rel=1e-4, abs=1e-5)
