"""The demo from end to end: model, reward model, PPO, and what came of it. `make demo` runs it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import demo_model
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
REWARD, PPO = HERE / "demo_reward.yaml", HERE / "demo_ppo.yaml"
REWARD_DIR = Path("output/demo/reward")
METRICS = Path("output/ppo_metrics")
HEAD = ("held-out prompts", "before", "after")
TITLES = {
    "judge": "judge (never seen in training), -1 to 1",
    "reward": "reward model",
    "length": "length (tokens)",
    "eos_share": "ended by themselves",
}
console = Console(highlight=False)


def train(config: Path) -> None:
    """`fastppo-train CONFIG`, as a user would type it."""
    command = [str(Path(sys.executable).with_name("fastppo-train")), str(config)]
    console.print(f"\n[bold]$ fastppo-train {config}[/bold]")
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def reward_model_is_there() -> bool:
    """Trained before, and neither its YAML nor its pairs are newer."""
    made = REWARD_DIR / "fastppo_reward.json"
    sources = (REWARD, *(HERE / "data").glob("demo_preferences*.json"))
    return made.is_file() and all(made.stat().st_mtime > path.stat().st_mtime for path in sources)


def rows(summary: dict[str, float]) -> list[tuple[str, str, str]]:
    """What was measured, before and after, as it is shown; README.md has these rows too."""
    found = [
        (title, f"{summary[f'{name}_before']:.2f}", f"{summary[f'{name}_after']:.2f}")
        for name, title in TITLES.items()
    ]
    return [*found, ("KL to the reference (nats a response)", "0.00", f"{summary['kl']:.2f}")]


def change(sample: dict[str, Any]) -> float:
    """How far the judge's score of the answer to a prompt rose."""
    return sample["judge_after"] - sample["judge_before"]


def of_median_change(samples: list[dict[str, Any]], count: int = 3) -> list[dict[str, Any]]:
    """The `count` samples in the middle, sorted by `change`: neither the best nor the worst."""
    first = max(0, (len(samples) - count + 1) // 2)
    return sorted(samples, key=change)[first : first + count]


def what_to_see(samples: list[dict[str, Any]], shown: int) -> str:
    """What the samples are that follow, and what a reader should see in them."""
    better = sum(change(sample) > 0 for sample in samples)
    return (
        f"The {shown} samples in the middle, by how far the judge's score rose (median "
        f"{statistics.median(map(change, samples)):+.2f}). After PPO the sentence should be about "
        "the same thing in warmer words (delightful, cozy, comfort); good prose is not what was "
        f"rewarded. Of all {len(samples)} answers {better} became more positive."
    )


def show(seconds: float) -> None:
    """The table, samples of the median change, and where the files are."""
    summary = json.loads((METRICS / "summary.json").read_text(encoding="utf-8"))
    table = Table(*HEAD, title="What PPO changed")
    for row in rows(summary):
        table.add_row(*row)
    console.print()
    console.print(table)
    samples = json.loads((METRICS / "samples.json").read_text(encoding="utf-8"))
    shown = of_median_change(samples)
    console.print(f"\n{what_to_see(samples, len(shown))}", soft_wrap=True)
    for sample in shown:
        console.print(f"\n[bold]{sample['prompt']}[/bold]")
        for when in ("before", "after"):
            console.print(
                f"  {when:6} ({sample[f'judge_{when}']:+.2f})  {sample[when]}", markup=False
            )
    console.print(
        f"\n{len(samples)} prompts, {summary['steps']} PPO steps, {seconds / 60:.1f} minutes"
    )
    for name in ("summary.json", "training_curves.png", "training_metrics.csv"):
        console.print(f"  {METRICS / name}")


def main() -> None:
    """Reuse what an earlier run left, except the policy."""
    began = time.monotonic()
    demo_model.main()
    if reward_model_is_there():
        console.print(f"reward model: {REWARD_DIR} is there")
    else:
        train(REWARD)
    train(PPO)
    show(time.monotonic() - began)


if __name__ == "__main__":
    main()
