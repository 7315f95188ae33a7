"""Keys of sampling and of evaluation. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from fastppo.config.key import LF, OWN, Above0, Keys, Positive, Stage, key
from fastppo.config.rewards import check_function_name


class SamplingKeys(Keys):
    """Keys of how the policy's responses are sampled."""

    title = "Sampling (stage ppo)"
    own_stage: ClassVar[Stage | None] = "ppo"

    do_sample: bool = key(True, LF, "false decodes greedily, for debugging.")
    temperature: Above0 = key(1.0, LF, "Temperature of the sampler and of every log-prob.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = key(
        1.0, LF, "Nucleus sampling; below 1 it truncates the policy."
    )
    top_k: Annotated[int, Field(ge=0)] = key(0, LF, "Above 0 it truncates the policy.")
    repetition_penalty: Above0 = key(
        1.0, LF, "With a value other than 1 the sampler differs from the policy."
    )
    max_new_tokens: Positive = key(1024, LF, "Largest number of tokens in a response.", first=True)
    min_new_tokens: Annotated[int, Field(ge=0)] = key(
        0, OWN, "Smallest number of tokens in a response."
    )
    lf_sampling: bool = key(
        False,
        OWN,
        "Use LLaMA-Factory's hidden defaults for keys that are not set: temperature 0.95, top_p "
        "0.7, top_k 50.",
    )

    @model_validator(mode="before")
    @classmethod
    def _hidden_sampling(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("lf_sampling") is True:
            return {"temperature": 0.95, "top_p": 0.7, "top_k": 50, **data}
        return data


class EvaluationKeys(Keys):
    """Keys of the evaluation of the policy."""

    title = "Metrics and evaluation (stage ppo)"
    own_stage: ClassVar[Stage | None] = "ppo"

    metrics_dir: str = key(
        "output/ppo_metrics", OWN, "Where a PPO run's metrics, picture and summary go."
    )
    eval_judge: str | None = key(
        None, OWN, "module:function that scores evaluation samples; it is not used in training."
    )
    eval_max_samples: Positive = key(64, OWN, "Largest number of prompts in an evaluation.")

    @model_validator(mode="after")
    def _judge_is_a_name(self) -> EvaluationKeys:
        if self.eval_judge is not None:
            check_function_name(self.eval_judge, "eval_judge")
        return self
