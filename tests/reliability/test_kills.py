"""SIGKILL at seeded random points, then a resume: the same bits as if nothing had happened."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.reliability import runs

pytestmark = pytest.mark.alone

# Stage, what is counted, how many kills of it: 20 points in stage ppo, and more in stage rm.
KINDS = {
    ("ppo", "anywhere"): 12,
    ("ppo", "saving"): 8,
    ("rm", "anywhere"): 3,
    ("rm", "saving"): 2,
}
PREPARE = {"anywhere": runs.kill_anywhere, "saving": runs.kill_while_saving}
POINTS = [(*kind, i) for kind, count in KINDS.items() for i in range(count)]


@pytest.fixture(scope="session")
def calls(home):
    """How many calls of functions there are to be killed at."""
    known: dict[tuple[str, str], int] = {}

    def get(stage: str, kind: str) -> int:
        if (stage, kind) not in known:
            make = {"ppo": runs.ppo, "rm": runs.rm}[stage]
            settings = make(home / f"counted-{stage}-{kind}")
            count = Path(settings["output_dir"]).parent / "count"
            code, said = runs.run(settings, PREPARE[kind], 0, str(count))
            assert code == 0, said
            known[stage, kind] = int(count.read_text())
        return known[stage, kind]

    return get


@pytest.mark.parametrize(("stage", "kind", "number"), POINTS)
def test_a_killed_run_goes_on_bit_for_bit(settings, unbroken, calls, stage, kind, number):
    generator = random.Random(f"{stage} {kind} {number}")
    mine = settings(stage)
    unused = str(Path(mine["output_dir"]).parent / "count")
    at = generator.randrange(1, int(0.98 * calls(stage, kind)))
    code, said = runs.run(mine, PREPARE[kind], at, unused)
    assert code == -9, f"was not killed at call {at}: {said}"
    if number % 4 == 0:  # and killed once more on the way
        at = generator.randrange(1, calls(stage, kind) // 3)
        runs.resume(mine, PREPARE[kind], at, unused)
    code, said = runs.resume(mine)
    assert code == 0, said
    assert runs.differences(runs.result(mine), unbroken(stage)) == []
    left = [path.name for path in Path(mine["output_dir"]).glob(".*")]
    assert left == [], "a killed run's half-written folders stay"
