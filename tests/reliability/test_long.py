"""300 steps of a tiny model: memory and open files stay where they are, and logs stay small."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability import runs

pytestmark = pytest.mark.alone  # it reads resident memory

STEPS = 300
MIB = 1 << 20


def test_a_long_run_grows_by_nothing(settings):
    mine = settings(
        "ppo",
        max_steps=STEPS,
        save_steps=20,
        eval_steps=50,
        gradient_accumulation_steps=1,
        max_new_tokens=4,
        ppo_epochs=1,
    )
    folder = Path(mine["output_dir"]).parent
    path = folder / "memory.txt"
    code, said = runs.run(mine, runs.watch_memory, str(path))
    assert code == 0, said
    table = [[int(x) for x in line.split()] for line in path.read_text().splitlines()]
    assert len(table) == STEPS
    sizes = {step: size / MIB for step, size, _ in table}
    # The first pictures load fonts and widen the allocator's pools; from the third on all is there.
    middle, end = (max(sizes[i] for i in range(a + 1, a + 51)) for a in (STEPS // 2, STEPS - 50))
    print(f"resident: {sizes[1]:.1f} MiB, {middle:.1f} by step 200, {end:.1f} by step 300, at most")
    assert end - middle < 4.0, f"{end - middle:.1f} MiB more over the last 100 steps"
    files = {count for step, _, count in table if step > STEPS // 2}
    print(f"open files: {sorted(files)}")
    assert len(files) == 1, files
    rows = (Path(mine["metrics_dir"]) / "training_metrics.csv").stat().st_size
    print(f"training_metrics.csv: {rows / STEPS:.0f} bytes a step; said: {len(said) / STEPS:.0f}")
    assert rows < 800 * STEPS
    assert len(said) < 250 * STEPS
    assert len(list(Path(mine["output_dir"]).glob("checkpoint-*"))) == 2
