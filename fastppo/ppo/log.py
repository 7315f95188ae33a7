"""The log of a PPO run in output_dir: trainer_log.jsonl, trainer_state.json, train_results.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerState

from fastppo.ppo import best
from fastppo.run import results

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.ppo.state import State


def total_loss(row: Mapping[str, float], config: Config) -> float:
    """The loss that the optimiser minimised in a step, computed from the step's row of metrics.

        policy_loss + kl_loss + vf_coef * value_loss + ptx_coef * ptx_loss - entropy_coef * entropy

    A column that the run does not have counts as 0.
    """
    weights = {"policy_loss": 1.0, "kl_loss": 1.0, "value_loss": config.vf_coef}
    loss = sum(weight * row.get(name, 0.0) for name, weight in weights.items())
    return loss + config.ptx_coef * row.get("ptx_loss", 0.0) - config.entropy_coef * row["entropy"]


def step_entry(row: Mapping[str, float], config: Config) -> dict[str, Any]:
    """A row of metrics as a log entry: its columns, and LLaMA-Factory's `loss` and `reward`."""
    return {**row, "loss": total_loss(row, config), "reward": row["score"]}


def log_step(state: State) -> None:
    """Append the last step to `trainer_log.jsonl`."""
    log_entry(state, step_entry(state.metrics.rows[-1], state.config))


def log_entry(state: State, entry: Mapping[str, Any]) -> None:
    """Append an entry (a step or an evaluation) to `trainer_log.jsonl`."""
    if not state.world.main:
        return
    folder, steps = Path(state.config.output_dir), state.total_steps
    results.log_line(folder, entry, step=state.step, total_steps=steps, seconds=state.seconds())


def log_history(state: State) -> list[dict[str, Any]]:
    """The entries of all steps and evaluations so far, in order."""
    entries = [step_entry(row, state.config) for row in state.metrics.rows]
    return sorted([*entries, *state.evaluations], key=lambda each: each["step"])


def write_trainer_state(state: State, folder: Path) -> None:
    """Write `trainer_state.json` as transformers' trainers write theirs."""
    config, rows = state.config, state.metrics.rows
    TrainerState(
        epoch=rows[-1]["epoch"] if rows else 0,
        global_step=state.step,
        max_steps=state.total_steps,
        logging_steps=1,
        save_steps=config.save_steps,  # type: ignore[arg-type]  # may be a share of the run
        train_batch_size=config.per_device_train_batch_size,
        num_train_epochs=config.num_train_epochs,  # type: ignore[arg-type]  # may be a fraction
        num_input_tokens_seen=tokens_sampled(state),
        log_history=log_history(state),
        **best.trainer_state(state.evaluations, config, config.output_dir),
    ).save_to_json(str(folder / results.TRAINER_STATE))


def responses_sampled(state: State) -> int:
    """All responses that the run has sampled for training, those that were left out too."""
    usual = state.config.rollout_batch_size
    return int(sum(row.get("sampled_responses", usual) for row in state.metrics.rows))


def tokens_sampled(state: State) -> int:
    """All tokens of those responses."""
    rows = state.metrics.rows
    return int(sum(row.get("sampled_tokens", row["response_tokens"]) for row in rows))


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The log entries of evaluations in a checkpoint's `trainer_state.json`."""
    path = folder / results.TRAINER_STATE
    if not path.is_file():
        return []
    history = json.loads(path.read_text(encoding="utf-8")).get("log_history", [])
    return [each for each in history if "eval_reward" in each]


def train_metrics(state: State) -> dict[str, Any]:
    """The metrics of `train_results.json`: speed, mean loss, and the reward of the last step."""
    rows, seconds = state.metrics.rows, max(state.seconds(), 1e-9)
    count = responses_sampled(state)
    metrics: dict[str, Any] = {
        "train_runtime": round(seconds, 2),
        "train_samples": count,
        "train_samples_per_second": round(count / seconds, 3),
        "train_steps_per_second": round(state.step / seconds, 3),
    }
    if rows:
        losses = [total_loss(row, state.config) for row in rows]
        metrics |= {
            "epoch": rows[-1]["epoch"],
            "train_loss": sum(losses) / len(losses),
            "train_reward": rows[-1]["score"],
        }
    return metrics
