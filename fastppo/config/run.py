"""Keys that say what a run does and where its files go. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from fastppo.config.key import HF, LF, Keys, Positive, key
from fastppo.config.old_names import meant
from fastppo.config.parallel import FSDP_IDLE, check_fsdp, fsdp_settings


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
    overwrite_output_dir: bool = key(
        False,
        LF,
        "Allow an output_dir that is not empty; checkpoints of earlier runs stay in it.",
    )
    resume_from_checkpoint: bool | str | None = key(
        None,
        HF,
        "A checkpoint-N, or true for the newest complete one of the run in output_dir; "
        "docs/reliability.md.",
    )
    ddp_timeout: Positive = key(
        1800,
        HF,
        "Seconds that one of several processes waits for the others (docs/scaling.md): more than "
        "the longest phase of a step, an evaluation or a checkpoint takes.",
    )
    fsdp: bool | str | None = key(
        None,
        HF,
        "true or full_shard: of several processes each holds a part of the frozen base's decoder "
        "layers (FSDP2), in stage ppo with LoRA; experimental. docs/scaling.md.",
    )
    fsdp_config: dict[str, Any] | str | None = key(
        None,
        HF,
        "What transformers reads with fsdp, or the path of a JSON file of it: fsdp_version 2, with "
        "reshard_after_forward and without cpu_offload; a line names what else has no effect.",
    )

    @property
    def shards(self) -> bool:
        """Whether `fsdp` asks for a base that is sharded over the processes of the run."""
        return self.fsdp is not None

    @property
    def fsdp_without_effect(self) -> list[str]:
        """The keys of `fsdp_config` that do nothing here."""
        return [name for name in fsdp_settings(self.fsdp_config) if name in FSDP_IDLE]

    @field_validator("fsdp", mode="before")
    @classmethod
    def _fsdp_off_is_null(cls, value: Any) -> Any:
        words = " ".join(map(str, value)) if isinstance(value, list) else value
        return None if meant(words) in (None, False, "", 0) else words

    @model_validator(mode="after")
    def _fsdp_is_one_that_is_done(self) -> RunKeys:
        if self.fsdp is not None:
            check_fsdp(self.fsdp, fsdp_settings(self.fsdp_config))
        return self

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
