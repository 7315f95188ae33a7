"""The 7B benchmark, walked through at toy sizes: it must not fail for the first one with a GPU."""

from __future__ import annotations

import json

from benchmarks import seven_b
from benchmarks.gpu import main


def test_every_part_runs_and_is_written_when_it_ends(tmp_path, capsys):
    assert main(["seven_b", "--toy", "--out", str(tmp_path / "toy.json")]) == 0
    found = json.loads((tmp_path / "toy.json").read_text())
    ways = ["fastppo", "fastppo, checkpoint", "fastppo, checkpoint+offload", "the usual way"]
    assert [(row["length"], row["way"]) for row in found] == [
        (length, way) for length in seven_b.TOY.lengths for way in ways
    ]
    for row in found:
        assert all(took["seconds"] >= 0 for took in row["phases"].values())
        if row["way"].startswith("fastppo, "):
            assert list(row["phases"]) == ["rollout", "score", "advantage", "update"]
            assert row["planned_gib"] >= 0
    assert "| ppo | 96 | the usual way | update |" in capsys.readouterr().out
