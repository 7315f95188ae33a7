"""Keys that say what a run does and where its files go. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from fastppo.config.key import HF, LF, Keys, Positive, key


class RunKeys(Keys):
    """Keys that say whether a run trains, evaluates or predicts, and where its files go."""

    title = "Run"

    stage: Literal["rm", "ppo"] = key(
        ..., LF, "rm trains a reward model from pairs, ppo a policy.", first=True
    )
    do_train: bool | None = key(
        None, HF, "Train; null is true unless the file has only do_eval or do_predict."
    )
    do_eval: bool | None = key(
        None,
        HF,
        "Evaluate on the held-out data, which a run that trains does anyway. docs/evaluation.md.",
    )
    do_predict: bool | None = key(
        None, HF, "Write generated_predictions.jsonl for all held-out data."
    )
    output_dir: str = key(..., HF, "Where adapters, heads and checkpoints go.", first=True)
    overwrite_output_dir: bool = key(False, LF, "Allow an output_dir that is not empty.")
    resume_from_checkpoint: bool | str | None = key(
        None,
        HF,
        "A checkpoint-N, or true for the newest complete one in output_dir; docs/reliability.md.",
    )
    ddp_timeout: Positive = key(
        1800,
        HF,
        "Seconds that one of several processes waits for the others (docs/scaling.md): more than "
        "the longest phase of a step, an evaluation or a checkpoint takes.",
    )

    @property
    def trains(self) -> bool:
        """do_train; if it is not set, a run trains unless do_eval or do_predict is set."""
        return not (self.do_eval or self.do_predict) if self.do_train is None else self.do_train

    @model_validator(mode="before")
    @classmethod
    def _evaluation_needs_no_dataset(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("dataset") and not data.get("do_train"):
            only = data.get("do_eval") or data.get("do_predict")
            return {**data, "dataset": data.get("eval_dataset")} if only else data
        return data

    @model_validator(mode="after")
    def _something_is_left_to_do(self) -> RunKeys:
        if not (self.trains or self.do_eval or self.do_predict):
            raise ValueError("do_train: false leaves nothing to do; set it to true or leave it out")
        return self
