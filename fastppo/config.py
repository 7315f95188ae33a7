"""The YAML: every key that fastppo knows, with LLaMA-Factory's and TRL's names and meanings.

No torch here: `--help` and a wrong key must answer at once.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from fastppo.config_data import DATA_LISTS, DataKeys
from fastppo.config_file import override, parse_value, read_file
from fastppo.config_key import HF, LF, OWN, Above0, Finite, Positive, key
from fastppo.config_memory import MemoryKeys
from fastppo.config_not_here import IGNORED, NOT_HERE, OLD_NAMES, REFUSED
from fastppo.config_ppo import ALIASES, ELSEWHERE, PPOKeys
from fastppo.config_roles import ROLES_LISTS, RolesKeys, check_roles
from fastppo.config_step import StepKeys, check_step
from fastppo.config_training import TRAINING_LISTS, TrainingKeys
from fastppo.errors import UserError
from fastppo.offload_config import check_offload
from fastppo.reward_spec import RewardSpec, check_function_name, check_kind, reward_specs, split


class Config(DataKeys, MemoryKeys, TrainingKeys, PPOKeys, RolesKeys, StepKeys):
    """One run, as its YAML file describes it. Frozen; checked; one sentence a key."""

    stage: Literal["rm", "ppo"] = key(..., LF, "rm trains a reward model from pairs, ppo a policy.")
    do_train: bool | None = key(
        None, HF, "Train; null is true unless the file has only do_eval or do_predict."
    )
    do_eval: bool | None = key(
        None,
        HF,
        "Evaluate on what is held out, which a run that trains does anyway. docs/evaluation.md.",
    )
    do_predict: bool | None = key(
        None, HF, "Write generated_predictions.jsonl of all that is held out."
    )

    model_name_or_path: str = key(..., LF, "The base: a local folder or a hub name.")
    model_gguf_file: str | None = key(
        None, OWN, "GGUF file inside model_name_or_path to read weights from."
    )
    model_revision: str = key("main", LF, "Branch, tag or commit on the hub.")
    cache_dir: str | None = key(None, LF, "Where the hub's files are kept.")
    hf_hub_token: str | None = key(
        None, LF, "Token for the hub; null is HF_TOKEN of the environment, or the login's."
    )
    trust_remote_code: bool = key(
        False, LF, "Run code that comes with the model; off unless asked."
    )
    flash_attn: Literal["auto", "sdpa", "disabled", "fa2"] = key(
        "auto",
        LF,
        "Attention: fa2 is flash-attn, sdpa PyTorch's, disabled eager; auto is fa2 where it can "
        "run, else sdpa.",
    )

    finetuning_type: Literal["lora", "freeze", "full"] = key(
        "lora", LF, "What of the policy trains: adapters, some layers, or all."
    )
    lora_rank: Positive = key(8, LF, "Rank of the adapters.")
    lora_alpha: Positive | None = key(None, LF, "Scale of the adapters; null is twice the rank.")
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = key(
        0.0, LF, "Dropout in the adapters, in stage rm only: PPO's log-probs allow none."
    )
    lora_target: str = key(
        "all", LF, "Names of the adapted linear layers, comma separated; all of them."
    )
    lora_layers: Positive | None = key(
        None, OWN, "Adapters on so many upper layers only; null is all."
    )
    use_rslora: bool = key(False, LF, "Rank-stabilised scaling of the adapters.")
    use_dora: bool = key(False, LF, "Weight-decomposed adapters.")

    reward_model: str | None = key(
        None,
        LF,
        "Folder, hub name, URL or module:function, as reward_model_type says; several make a list.",
    )
    reward_model_type: str = key(
        "lora", LF, "lora, full, api or function (docs/rewards.md); a list where there are several."
    )
    reward_weights: tuple[Finite, ...] | None = key(
        None, OWN, "A weight for each reward; null is 1 for each."
    )
    reward_model_adapters: str | None = key(
        None, LF, "Adapters on a reward of type full, comma separated, merged in their order."
    )
    reward_model_quantization_bit: Literal[4, 8] | None = key(
        None, LF, "Load a reward of type full in so many bits, with bitsandbytes."
    )
    reward_api_timeout: Annotated[float, Field(gt=0.0, le=86400.0)] = key(
        60.0, OWN, "Seconds until an attempt at a reward of type api has failed."
    )
    reward_api_retries: Annotated[int, Field(ge=0, le=100)] = key(
        5, OWN, "Attempts after the first, with waits that double from half a second up to 30."
    )
    critic: Literal["adapter", "shared", "model"] = key(
        "adapter",
        OWN,
        "adapter has an adapter and head of its own, shared a head on the actor's trunk, model a "
        "whole model.",
    )
    value_head_init: Literal["reward", "zeros"] = key(
        "reward", OWN, "Where the critic's head starts: from the reward model's, or at 0."
    )
    calibrate_reward: bool = key(
        False,
        OWN,
        "In stage rm: scale the head so that scores of held-out answers have mean 0, std 1.",
    )

    output_dir: str = key(..., HF, "Where adapters, heads and checkpoints go.")
    overwrite_output_dir: bool = key(False, LF, "Allow an output_dir that is not empty.")
    metrics_dir: str = key(
        "output/ppo_metrics", OWN, "Where a PPO run's metrics, picture and summary go."
    )

    disable_gradient_checkpointing: bool = key(
        False, LF, "Keep activations in place of recomputing them: activation_offloading: none."
    )
    use_unsloth_gc: bool = key(False, LF, "The same as activation_offloading: checkpoint+offload.")
    activation_offloading: (
        Literal["none", "checkpoint", "offload", "checkpoint+offload", "auto"] | None
    ) = key(
        None,
        OWN,
        "What happens to activations between forward and backward, see docs/offload.md; null "
        "follows the two keys above, and is checkpoint without them.",
    )
    offload_dir: str | None = key(
        None, OWN, "Offload to memory-mapped files in this folder, in place of host memory."
    )
    stream_frozen: bool = key(
        False,
        OWN,
        "Whole frozen models (ref_model, reward_model_type: full) lie in host memory and "
        "pass through the device layer by layer, see docs/offload.md.",
    )
    resume_from_checkpoint: bool | str | None = key(
        None,
        HF,
        "A checkpoint-N, or true for the newest whole one in output_dir; docs/reliability.md.",
    )

    do_sample: bool = key(True, LF, "false decodes greedily, for debugging.")
    temperature: Above0 = key(1.0, LF, "Of the sampler and of every log-prob.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = key(
        1.0, LF, "Nucleus; below 1 truncates the policy."
    )
    top_k: Annotated[int, Field(ge=0)] = key(0, LF, "Above 0 truncates the policy.")
    repetition_penalty: Above0 = key(1.0, LF, "Other than 1 makes the sampler another policy.")
    max_new_tokens: Positive = key(1024, LF, "Most tokens of a response.")
    min_new_tokens: Annotated[int, Field(ge=0)] = key(0, OWN, "Fewest.")
    lf_sampling: bool = key(
        False, OWN, "LLaMA-Factory's hidden temperature 0.95, top_p 0.7, top_k 50 where unset."
    )

    eval_judge: str | None = key(
        None, OWN, "module:function that judges evaluation samples, and never enters training."
    )
    eval_max_samples: Positive = key(64, OWN, "Most prompts in an evaluation.")

    source: str = Field("<python>", exclude=True)
    ignored: tuple[str, ...] = Field((), exclude=True)

    @property
    def trains(self) -> bool:
        """do_train; where the file does not say, whether it asks for nothing else."""
        return not (self.do_eval or self.do_predict) if self.do_train is None else self.do_train

    @property
    def rollout_batch_size(self) -> int:
        """Sequences sampled in a PPO step."""
        micro = self.per_device_train_batch_size
        return micro * self.gradient_accumulation_steps * self.ppo_buffer_size

    @property
    def prompts_a_step(self) -> int:
        """Prompts in a PPO step, each answered `num_generations` times."""
        return self.rollout_batch_size // self.num_generations

    @property
    def resolved_lora_alpha(self) -> int:
        """lora_alpha, or LLaMA-Factory's twice the rank."""
        return self.lora_alpha if self.lora_alpha is not None else 2 * self.lora_rank

    @property
    def rewards(self) -> tuple[RewardSpec, ...]:
        """What scores the policy's responses; stage rm has nothing that does."""
        if self.stage != "ppo" or not self.reward_model:
            return ()
        return reward_specs(self.reward_model, self.reward_model_type, self.reward_weights)

    @property
    def reward_adapters(self) -> dict[str, str]:
        """Adapter name -> folder of each reward of type lora: `reward`, `reward_2`, ..."""
        folders = [spec.target for spec in self.rewards if spec.kind == "lora"]
        return {f"reward_{i}" if i > 1 else "reward": name for i, name in enumerate(folders, 1)}

    @model_validator(mode="before")
    @classmethod
    def _hidden_sampling(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("lf_sampling") is True:
            return {"temperature": 0.95, "top_p": 0.7, "top_k": 50, **data}
        return data

    @model_validator(mode="before")
    @classmethod
    def _evaluation_needs_no_dataset(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("dataset") and not data.get("do_train"):
            only = data.get("do_eval") or data.get("do_predict")
            return {**data, "dataset": data.get("eval_dataset")} if only else data
        return data

    @model_validator(mode="after")
    def _belongs_together(self) -> Config:
        if not (self.trains or self.do_eval or self.do_predict):
            raise ValueError("do_train: false leaves nothing to do; set it to true or leave it out")
        for name in ("do_eval", "do_predict"):
            # A PPO run that trains measures on its training prompts then, and says so.
            needed = name == "do_predict" or self.stage == "rm" or not self.trains
            if getattr(self, name) and needed and not (self.eval_dataset or self.val_size):
                raise ValueError(
                    f"{name}: nothing is held out; name an eval_dataset, or set val_size"
                )
        if self.stage == "ppo" and not self.reward_model:
            raise ValueError(
                "reward_model: stage ppo needs one; name the folder that stage rm wrote, or a "
                "module:function with reward_model_type: function"
            )
        for kind in split(self.reward_model_type):
            check_kind(kind)
        kinds = [spec.kind for spec in self.rewards]
        for name in ("reward_model_adapters", "reward_model_quantization_bit"):
            if getattr(self, name) is not None and kinds.count("full") != 1:
                raise ValueError(
                    f"{name}: is for the one reward of reward_model_type: full, and there are "
                    f"{kinds.count('full')}; leave it out"
                )
        if self.early_stopping_steps and self.stage == "ppo":
            raise ValueError(
                "early_stopping_steps: is stage rm's, whose evaluations have a best; use max_steps"
            )
        if self.early_stopping_steps and self.eval_strategy == "no":
            raise ValueError("early_stopping_steps: counts evaluations; set eval_strategy: steps")
        if self.lr_scheduler_type == "reduce_lr_on_plateau" and (
            self.stage == "ppo" or self.eval_strategy == "no"
        ):
            raise ValueError(
                "lr_scheduler_type: reduce_lr_on_plateau follows evaluations of stage rm, with "
                "eval_strategy; use cosine or linear"
            )
        for name in ("output_dir", "metrics_dir", "model_name_or_path", "dataset"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: is empty; give it a value")
        if self.eval_judge is not None:
            check_function_name(self.eval_judge, "eval_judge")
        check_roles(self)
        for name in ("min_new_tokens", "min_response_length"):
            if getattr(self, name) > self.max_new_tokens:
                raise ValueError(f"{name}: is above max_new_tokens; lower it")
        if self.stage == "ppo" and self.rollout_batch_size % self.num_generations:
            raise ValueError(
                f"num_generations: {self.num_generations} does not divide the "
                f"{self.rollout_batch_size} responses of a rollout (per_device_train_batch_size x "
                "gradient_accumulation_steps x ppo_buffer_size); change one of them"
            )
        check_offload(self)
        check_step(self)
        return self


# LLaMA-Factory's comma strings, which may be YAML lists too.
COMMA_LISTS = (
    *DATA_LISTS,
    *TRAINING_LISTS,
    "ptx_dataset",
    "lora_target",
    "reward_model",
    "reward_model_type",
    "reward_model_adapters",
    *ROLES_LISTS,
)
# Keys that say nothing to the other stage.
ONLY = {
    "ppo": frozenset(
        {
            *PPOKeys.model_fields,
            "critic",
            "critic_finetuning_type",
            "critic_model",
            "do_sample",
            "eval_judge",
            "eval_max_samples",
            "lf_sampling",
            "max_new_tokens",
            "metrics_dir",
            "min_new_tokens",
            "ref_model",
            "ref_model_adapters",
            "ref_model_quantization_bit",
            "repetition_penalty",
            "reward_api_retries",
            "reward_api_timeout",
            "reward_model",
            "reward_model_adapters",
            "reward_model_quantization_bit",
            "reward_model_type",
            "reward_weights",
            "stream_frozen",
            "temperature",
            "top_k",
            "top_p",
            "value_head_init",
        }
    ),
    "rm": frozenset({"calibrate_reward", "lora_dropout", "save_only_model"}),
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and check a file; a UserError names the file, the key and the cure."""
    path = Path(path)
    data = read_file(path)
    for text in overrides:
        override(data, text)
    return config_from_dict(data, source=str(path))


def renamed(data: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """`data` under the names used here, where a key goes by two."""
    given = {str(name): value for name, value in data.items()}
    for alias, name in ALIASES.items():
        if alias in given and name in given:
            raise UserError(f"{source}: {alias}: is TRL's name for {name}; keep one of the two")
        if alias in given:
            given[name] = given.pop(alias)
    for alias, name in OLD_NAMES.items():
        value = given.pop(alias, None)
        if value is not None and given.setdefault(name, value) != value:
            raise UserError(f"{source}: {alias}: is an older name of {name}; keep one of the two")
    return given


def config_from_dict(data: Mapping[Any, Any], source: str = "<python>") -> Config:
    """Check a mapping of keys."""
    given = renamed(data, source)
    ignored = []
    for name in list(given):
        value, reason = given[name], IGNORED.get(name)
        if reason is not None:
            del given[name]
            if value is not None:
                ignored.append(f"'{name}' means nothing here and is ignored: {reason}")
        elif name in REFUSED:
            harmless, cure = REFUSED[name]
            if given.pop(name) not in harmless:
                raise UserError(f"{source}: {name}: not supported; {cure}")
        elif (name, value) in ((k, v) for k, v in NOT_HERE):
            raise UserError(f"{source}: {name}: {value}: {NOT_HERE[name, value]}")
        elif name in ("source", "ignored") or name not in Config.model_fields:
            if os.environ.get("ALLOW_EXTRA_ARGS", "0").lower() in ("1", "true", "y"):
                ignored.append(f"'{name}' is unknown and ignored (ALLOW_EXTRA_ARGS)")
                del given[name]
                continue
            raise UserError(f"{source}: unknown key '{name}'; {suggest_key(name)}")
        elif value is None and Config.model_fields[name].default is not None:
            # `key:` with nothing behind it, as tutorials leave them: the default.
            if Config.model_fields[name].is_required():
                raise UserError(f"{source}: {name}: has no value; give it one")
            del given[name]
    given = {name: _listed(name, value) for name, value in given.items()}
    for name, value in given.items():
        if isinstance(value, str) and unwritable(value):
            raise UserError(f"{source}: {name}: {shown(value)} holds a null or half a character")
        if isinstance(value, bool) and "bool" not in str(Config.model_fields[name].annotation):
            raise UserError(
                f"{source}: {name}: {str(value).lower()} is wrong; it should be a value"
            )
    for name in of_other_stage(given):
        ignored.append(f"'{name}' means nothing to stage {given['stage']} and is ignored")
    try:
        return Config(**given, source=source, ignored=tuple(ignored))
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error)}") from None


def of_other_stage(given: Mapping[str, Any]) -> list[str]:
    """Keys that were set to other than their default, and are the other stage's."""
    other = {"rm": "ppo", "ppo": "rm"}.get(str(given.get("stage")), "")
    return [
        name
        for name in given
        if name in ONLY.get(other, ()) and given[name] != Config.model_fields[name].default
    ]


def _listed(name: str, value: Any) -> Any:
    """A YAML list where LLaMA-Factory has a comma string, and other spellings of one value."""
    if name in COMMA_LISTS and isinstance(value, list):
        return ",".join(str(item) for item in value)
    if name == "reward_weights" and not isinstance(value, bool):
        if isinstance(value, str):
            return split(value)
        return [value] if isinstance(value, int | float) else value
    if name == "lr_scheduler_kwargs" and isinstance(value, str):
        return parse_value(value)
    # YAML 1.1 reads `eval_strategy: no` as false.
    return "no" if name.endswith("_strategy") and value is False else value


def suggest_key(name: str) -> str:
    """The cure for an unknown key."""
    if name in ELSEWHERE:
        return f"here that is {ELSEWHERE[name]}"
    return suggest(name, [*(set(Config.model_fields) - {"source", "ignored"}), *IGNORED, *REFUSED])


def suggest(name: str, known: Sequence[str]) -> str:
    """The nearest of `known`, or where all of them are listed."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return "docs/config.md lists the keys; take it out, or set ALLOW_EXTRA_ARGS=1 to ignore it"


def explain(error: ValidationError) -> str:
    """The first complaint about a run's file in one line."""
    return explain_in(Config, error)


def explain_in(model: type[BaseModel], error: ValidationError) -> str:
    """The first complaint, in one line, with what was wanted, what came, and the cure."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    name = str(first["loc"][0]) if first["loc"] else "configuration"
    if first["type"] == "missing":
        meaning = model.model_fields[name].description or ""
        return f"{name}: is missing; add it: {meaning[0].lower()}{meaning[1:]}"
    came = first["input"]
    if first["type"] == "literal_error":
        expected = first["ctx"]["expected"].replace("'", "")
        words = expected.replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches(str(came), words, n=1, cutoff=0.6)
        return f"{name}: {shown(came)} is none of {expected}" + (
            f"; did you mean {near[0]}?" if near else "; choose one of them"
        )
    wanted = first["msg"].removeprefix("Input should be ")
    wanted = wanted.split(", unable")[0]
    return f"{name}: {shown(came)} is wrong; it should be {wanted}"


def unwritable(text: str) -> bool:
    """A null character, or half of a surrogate pair: neither a path nor a tokenizer takes it."""
    return "\0" in text or text.encode("utf-8", "ignore").decode() != text


def shown(value: Any) -> str:
    """A value as Python writes it, and no more of it than a line holds."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a list in itself
        return f"this {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
