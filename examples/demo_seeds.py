"""The demo's PPO over three seeds, on the reward model that is there: `make demo-seeds`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

RESULT = Path("benchmarks/results/demo_seeds.json")
SEEDS = (1, 2, 3)
KEPT = (
    "judge_before",
    "judge_after",
    "reward_before",
    "reward_after",
    "kl",
    "length_before",
    "length_after",
    "eos_share_before",
    "eos_share_after",
    "steps",
    "seconds",
)


def processor() -> str:
    """The CPU by name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def run(seed: int) -> dict[str, float]:
    """One PPO run; its files go where the demo's do not."""
    metrics = Path(f"output/seeds/{seed}")
    command = [
        str(Path(sys.executable).with_name("fastppo-train")),
        "examples/demo_ppo.yaml",
        f"seed={seed}",
        f"metrics_dir={metrics}",
        f"output_dir=output/seeds/{seed}/policy",
    ]
    subprocess.run(command, check=True)
    summary = json.loads((metrics / "summary.json").read_text(encoding="utf-8"))
    return {"seed": seed, **{name: summary[name] for name in KEPT}}


def main() -> None:
    """Run, and write the results with machine and date."""
    runs = [run(seed) for seed in SEEDS]
    result = {
        "command": "make demo-seeds",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores of {processor()}, no GPU",
        "torch": torch.__version__,
        "runs": runs,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for one in runs:
        print(
            f"seed {one['seed']}: judge {one['judge_before']:+.2f} -> {one['judge_after']:+.2f}, "
            f"reward {one['reward_before']:+.2f} -> {one['reward_after']:+.2f}, kl {one['kl']:.2f}"
        )


if __name__ == "__main__":
    main()
