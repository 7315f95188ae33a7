"""The files that LLaMA-Factory's users look for in output_dir, under its names.

| file                         | what                                                             |
|------------------------------|------------------------------------------------------------------|
| `trainer_log.jsonl`          | a line a log entry, with the time left                           |
| `trainer_state.json`         | transformers' TrainerState: where the run is, and its log        |
| `train_results.json`, ...    | the last metrics of a split (train, eval, predict)               |
| `all_results.json`           | all of them together                                             |
| `generated_predictions.jsonl`| a line a held-out record                                         |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastppo.run.durable import INFO, RUN, write_text

LOG, ALL, PREDICTIONS = "trainer_log.jsonl", "all_results.json", "generated_predictions.jsonl"
TRAINER_STATE = "trainer_state.json"
SPLITS = ("train", "eval", "predict")
# LLaMA-Factory's name in trainer_log.jsonl -> the name in a log entry.
LOGGED = {
    "loss": "loss",
    "eval_loss": "eval_loss",
    "reward": "reward",
    "eval_reward": "eval_reward",
    "eval_accuracy": "eval_accuracy",
    "lr": "learning_rate",
    "epoch": "epoch",
}


def save_metrics(folder: Path, split: str, metrics: Mapping[str, Any]) -> None:
    """Write `<split>_results.json` and update `all_results.json`, as transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{split}_results.json", metrics)
    path = folder / ALL
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**earlier, **metrics})


def write_json(path: Path, value: Any) -> None:
    """Write JSON, sorted and indented as transformers does, completely or not at all."""
    text = json.dumps(value, indent=4, sort_keys=True, ensure_ascii=False)
    write_text(path, text + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, in readable UTF-8."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def clear(folder: Path) -> None:
    """Delete the results of an earlier run, which would be read as part of the new one."""
    for name in (LOG, ALL, PREDICTIONS, *(f"{split}_results.json" for split in SPLITS)):
        (folder / name).unlink(missing_ok=True)


def withdraw(folder: Path) -> None:
    """Delete what the start of a run wrote, and the folder if nothing else is in it."""
    for name in (LOG, RUN, INFO):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # it holds files of the user's
        folder.rmdir()


def begin_log(folder: Path, step: int = 0, *, evaluated: bool = True) -> None:
    """Start `trainer_log.jsonl`: empty, or for a run resumed after `step`, its lines up to there.

    If not `evaluated`, the evaluation after `step` is left out, because it will run again.
    """
    path, kept = folder / LOG, []
    if step and path.is_file():
        # By newlines alone, and without what a killed run left of its last line.
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            entry = json.loads(line)
            at, to_come = entry.get("current_steps", 0), "eval_reward" in entry and not evaluated
            if at < step or (at == step and not to_come):
                kept.append(line + "\n")
    write_text(path, "".join(kept))


def log_line(
    folder: Path, entry: Mapping[str, Any], *, step: int, total_steps: int, seconds: float
) -> None:
    """Append the log entry of `step` to `trainer_log.jsonl`; `seconds` is the run's time."""
    left = seconds / max(1, step) * (total_steps - step)
    line: dict[str, Any] = {"current_steps": step, "total_steps": total_steps}
    line |= {name: entry[key] for name, key in LOGGED.items() if key in entry}
    line |= {
        "percentage": round(step / total_steps * 100, 2) if total_steps else 100,
        "elapsed_time": str(timedelta(seconds=int(seconds))),
        "remaining_time": str(timedelta(seconds=int(left))),
    }
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
