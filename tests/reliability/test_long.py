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
    code = runs.finish(runs.start(mine, runs.watch_memory, str(path)))
    said = (folder / "said.txt").read_text(encoding="utf-8")
    assert code == 0, said
    table = [[int(x) for x in line.split()] for line in path.read_text().splitlines()]
    sizes = {step: size / MIB for step, size, _ in table}
    assert list(sizes) == list(range(runs.SETTLED, STEPS + 1, runs.SETTLED))
    # The first pictures load fonts and widen the allocator's pools; from the third on all is there.
    middle, end = (
        max(size for step, size in sizes.items() if a < step <= a + 50)
        for a in (STEPS // 2, STEPS - 50)
    )
    print(f"resident: {sizes[10]:.1f} MiB, at most {middle:.1f} by step 200, {end:.1f} by 300")
    assert end - middle < 4.0, f"{end - middle:.1f} MiB more over the last 100 steps"
    files = {count for step, _, count in table if step > STEPS // 2}
    print(f"open files: {sorted(files)}")
    assert len(files) == 1, files
    rows = (Path(mine["metrics_dir"]) / "training_metrics.csv").stat().st_size
    print(f"training_metrics.csv: {rows / STEPS:.0f} bytes a step; said: {len(said) / STEPS:.0f}")
    assert rows < 800 * STEPS
    assert len(said) < 250 * STEPS
    assert len(list(Path(mine["output_dir"]).glob("checkpoint-*"))) == 2
