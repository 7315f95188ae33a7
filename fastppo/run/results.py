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
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerState

from fastppo.run.durable import write_text

if TYPE_CHECKING:
    from fastppo.ppo.state import State

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
    """`<split>_results.json`, and the same into `all_results.json`, as transformers has them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{split}_results.json", metrics)
    path = folder / ALL
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**earlier, **metrics})


def write_json(path: Path, value: Any) -> None:
    """Sorted and indented as transformers does it; whole or not at all."""
    text = json.dumps(value, indent=4, sort_keys=True, ensure_ascii=False)
    write_text(path, text + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSON object a line, in UTF-8 that people can read."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def clear(folder: Path) -> None:
    """Take away an earlier run's results: a new run's would be read beside them as one."""
    for name in (LOG, ALL, PREDICTIONS, *(f"{split}_results.json" for split in SPLITS)):
        (folder / name).unlink(missing_ok=True)


def begin_log(folder: Path, step: int = 0, *, evaluated: bool = True) -> None:
    """An empty `trainer_log.jsonl`; for a run that goes on after `step`, its lines up to there.

    Not `evaluated`: without the evaluation after `step`, which is still to come.
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
    """Append to `trainer_log.jsonl` what a log entry says of `step`, `seconds` into the run."""
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


def log_step(state: State) -> None:
    """The step that a PPO run has just taken, into its log."""
    log(state, entry(state, state.metrics.rows[-1]))


def log(state: State, entry: Mapping[str, Any]) -> None:
    """An entry of a PPO run, into its log."""
    folder, steps = Path(state.config.output_dir), state.total_steps
    log_line(folder, entry, step=state.step, total_steps=steps, seconds=state.seconds())


def entry(state: State, row: Mapping[str, float]) -> dict[str, Any]:
    """A PPO step as a log entry: the metrics' columns, and LLaMA-Factory's `loss` and `reward`."""
    config = state.config
    parts = {"policy_loss": 1.0, "kl_loss": 1.0, "value_loss": config.vf_coef}
    loss = sum(weight * row.get(name, 0.0) for name, weight in parts.items())
    loss += config.ptx_coef * row.get("ptx_loss", 0.0) - config.entropy_coef * row["entropy"]
    return {**row, "loss": loss, "reward": row["score"]}


def log_history(state: State) -> list[dict[str, Any]]:
    """Every step and every evaluation of a PPO run, in their order."""
    entries = [entry(state, row) for row in state.metrics.rows]
    return sorted([*entries, *state.evaluations], key=lambda each: each["step"])


def write_trainer_state(state: State, folder: Path) -> None:
    """`trainer_state.json` of a PPO run, as transformers' trainers write theirs."""
    config, rows = state.config, state.metrics.rows
    TrainerState(
        epoch=rows[-1]["epoch"] if rows else 0,
        global_step=state.step,
        max_steps=state.total_steps,
        logging_steps=1,
        save_steps=config.save_steps,
        train_batch_size=config.per_device_train_batch_size,
        num_train_epochs=config.num_train_epochs,
        num_input_tokens_seen=int(sum(row["response_tokens"] for row in rows)),
        log_history=log_history(state),
    ).save_to_json(str(folder / TRAINER_STATE))


def evaluations_in(folder: Path) -> list[dict[str, Any]]:
    """The evaluations that a checkpoint's log has."""
    path = folder / TRAINER_STATE
    if not path.is_file():
        return []
    history = json.loads(path.read_text(encoding="utf-8")).get("log_history", [])
    return [each for each in history if "eval_reward" in each]


def train_metrics(state: State) -> dict[str, Any]:
    """What transformers' trainers say of a finished run, and the reward of its last step."""
    rows, seconds = state.metrics.rows, max(state.seconds(), 1e-9)
    count = state.step * state.config.rollout_batch_size
    metrics: dict[str, Any] = {
        "train_runtime": round(seconds, 2),
        "train_samples": count,
        "train_samples_per_second": round(count / seconds, 3),
        "train_steps_per_second": round(state.step / seconds, 3),
    }
    if rows:
        losses = [entry(state, row)["loss"] for row in rows]
        metrics |= {
            "epoch": rows[-1]["epoch"],
            "train_loss": sum(losses) / len(losses),
            "train_reward": rows[-1]["score"],
        }
    return metrics
