"""Read what a run of fastppo-train has left in output_dir and metrics_dir, finished or not."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastppo.errors import UserError
from fastppo.run.durable import INFO, NUMBERED, RUN, own_checkpoints

LOG, STATE, CSV = "trainer_log.jsonl", "trainer_state.json", "training_metrics.csv"
EVALUATION, SAMPLES = "eval_results.json", "eval_samples.jsonl"
LEFT_BY_A_RUN = (INFO, RUN, LOG, EVALUATION)


@dataclass(frozen=True)
class Run:
    """What is known of a run; a part that was not found is empty.

    Attributes:
        folder: its output_dir.
        info: what it recorded of itself when it started (`fastppo.run.record`).
        status: finished, running or how it ended, in words.
        progress: the last line of its log: steps, time taken and time left.
        rows: metrics by step; of stage rm the log entries.
        evaluation: eval_results.json.
        samples: responses of policy and reference to held-out prompts.
        remarks: what could not be read, and why.
        evaluations: of stage ppo, the log entry of each evaluation.
    """

    folder: Path
    info: dict[str, Any]
    status: str
    progress: dict[str, Any]
    rows: list[dict[str, float]]
    evaluation: dict[str, Any]
    samples: list[dict[str, Any]]
    remarks: list[str]
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stage(self) -> str:
        """`ppo` or `rm`; of a run without a record by what it logged."""
        found = self.info.get("stage")
        if isinstance(found, str):
            return found
        of_pairs = "eval_accuracy" in self.evaluation or any("lr" in row for row in self.rows)
        return "rm" if of_pairs and "eval_win_rate" not in self.evaluation else "ppo"


def read_run(folder: Path) -> Run:
    """Read the run in `folder`.

    Raises:
        UserError: `folder` is not there, or holds no run.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the output_dir of a run")
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; name the output_dir of a run")
    if NUMBERED.fullmatch(folder.name) and not (folder / INFO).is_file():
        raise UserError(f"{folder} is a checkpoint; name its run's output_dir, {folder.parent}")
    if not any((folder / name).is_file() for name in LEFT_BY_A_RUN):
        raise UserError(
            f"{folder} holds no run of fastppo-train (none of {', '.join(LEFT_BY_A_RUN)}); name "
            "its output_dir"
        )
    info = read_json(folder / INFO)
    log = read_jsonl(folder / LOG)
    rows, remarks = read_rows(folder, info, log)
    evaluation = read_json(folder / EVALUATION)
    progress = log[-1] if log else {}
    return Run(
        folder=folder,
        info=info,
        status=status_of(folder, info, progress),
        progress=progress,
        rows=rows,
        evaluation=evaluation,
        # Those of an earlier run stay until this one has evaluated.
        samples=read_jsonl(folder / SAMPLES) if evaluation else [],
        remarks=remarks,
        evaluations=read_evaluations(folder),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, a line each; a line that was cut short is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read_rows(
    folder: Path, info: dict[str, Any], log: list[dict[str, Any]]
) -> tuple[list[dict[str, float]], list[str]]:
    """The metrics by step, and a remark if they are not all there.

    Of stage ppo they are training_metrics.csv, unless another run has written that since; then,
    and in stage rm, the history in trainer_state.json, and after it the log.
    """
    remarks: list[str] = []
    if info.get("metrics_dir") and info.get("stage") != "rm":
        path = Path(info["metrics_dir"]) / CSV
        rows = read_csv(path)
        if rows and same_run(rows, log):
            return rows, remarks
        if log:
            why = "is of another run" if rows else "is not there"
            remarks.append(f"{path} {why}: the curves are those of the log in {folder}")
    rows = []
    for place in (folder, *reversed(own_checkpoints(folder))):
        history = read_json(place / STATE).get("log_history", [])
        rows = [numbers(entry) for entry in history if isinstance(entry, dict)]
        if rows:
            break
    last = max((row.get("step", 0) for row in rows), default=0)
    later = [numbers(entry) for entry in log if entry.get("current_steps", 0) > last]
    for row in later:
        row["step"] = row.pop("current_steps")
        row.update({"score": row["reward"]} if "reward" in row else {})
    return sorted([*rows, *later], key=lambda row: row.get("step", 0)), remarks


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Every evaluation of stage ppo, by step, with all its numbers.

    They are in trainer_state.json: trainer_log.jsonl has LLaMA-Factory's few names alone. Of a run
    that has not finished they go as far as its newest checkpoint.
    """
    for place in (folder, *reversed(own_checkpoints(folder))):
        history = read_json(place / STATE).get("log_history", [])
        found = [each for each in history if isinstance(each, dict) and "eval_reward" in each]
        if found:
            return sorted(found, key=lambda each: each.get("step", 0))
    return []


def read_csv(path: Path) -> list[dict[str, float]]:
    """The rows of training_metrics.csv; empty cells are left out, and a last line cut short."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    whole = text[: text.rfind("\n") + 1]
    found = []
    for cells in csv.DictReader(whole.splitlines()):
        row = {}
        for name, cell in cells.items():
            if isinstance(name, str) and isinstance(cell, str) and cell:
                try:
                    row[name] = float(cell)
                except ValueError:
                    continue
        if "step" in row:
            found.append(row)
    return found


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    """The finite and infinite numbers of a log entry, without booleans and texts."""
    return {
        name: float(value)
        for name, value in entry.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def same_run(rows: list[dict[str, float]], log: list[dict[str, Any]]) -> bool:
    """Whether the scores of the metrics are those that the log has for the same steps."""
    scores = {row["step"]: row.get("score", math.nan) for row in rows}
    logged = [
        (e["current_steps"], e["reward"]) for e in log if {"current_steps", "reward"} <= e.keys()
    ]
    both = [(scores[step], value) for step, value in logged if step in scores]
    close = all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in both)
    return close and (bool(both) or not logged)


def status_of(folder: Path, info: dict[str, Any], progress: dict[str, Any]) -> str:
    """finished, running or how the run ended, in words."""
    if info.get("ended"):
        return str(info["ended"])
    if (folder / "train_results.json").is_file():
        return "finished"
    if not progress and not info:
        return "an evaluation without training"
    process = info.get("process")
    if isinstance(process, dict) and process.get("host") == platform.node():
        return "running" if is_alive(process.get("pid")) else "cut off: its process is gone"
    return "not finished: it runs on another machine, or was cut off"


def is_alive(pid: Any) -> bool:
    """Whether a process of that number runs on this machine."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, TypeError, OverflowError):
        return False
    return True
