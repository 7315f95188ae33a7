"""The YAML: every key that fastppo knows, with LLaMA-Factory's and TRL's names and meanings.

No torch here: `--help` and a wrong key must answer at once.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from fastppo.config_data import DATA_LISTS, DataKeys
from fastppo.config_file import parse_override, read_file
from fastppo.config_key import HF, LF, OWN, Above0, Finite, NonNegative, Positive, Share, key
from fastppo.config_ppo import ALIASES, ELSEWHERE, TRL_IGNORED, PPOKeys
from fastppo.config_roles import ROLES_LISTS, RolesKeys, check_roles
from fastppo.errors import UserError
from fastppo.offload_config import check_offload
from fastppo.reward_spec import RewardSpec, check_function_name, check_kind, reward_specs, split


class Config(DataKeys, PPOKeys, RolesKeys):
    """One run, as its YAML file describes it. Frozen; checked; one sentence a key."""

    stage: Literal["rm", "ppo"] = key(..., LF, "rm trains a reward model from pairs, ppo a policy.")
    do_train: bool | None = key(None, HF, "Train; with no do_* key at all a file means train.")
    do_eval: bool | None = key(
        None, HF, "Accepted; evaluation runs wherever there is something held out."
    )
    do_predict: bool | None = key(None, HF, "Accepted only as false: there is no predict here.")

    model_name_or_path: str = key(..., LF, "The base: a local folder or a hub name.")
    model_gguf_file: str | None = key(
        None, OWN, "GGUF file inside model_name_or_path to read weights from."
    )
    model_revision: str = key("main", LF, "Branch, tag or commit on the hub.")
    cache_dir: str | None = key(None, LF, "Where the hub's files are kept.")
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

    per_device_train_batch_size: Positive = key(
        8, HF, "Sequences in a micro-batch (pairs in stage rm)."
    )
    per_device_eval_batch_size: Positive = key(8, HF, "The same in evaluation.")
    gradient_accumulation_steps: Positive = key(1, HF, "Micro-batches in an optimiser step.")
    learning_rate: NonNegative = key(5e-5, HF, "Peak learning rate (the actor's).")
    num_train_epochs: Above0 = key(3.0, HF, "Passes over the data set.")
    max_steps: int = key(
        -1, HF, "Stop after so many steps, whatever num_train_epochs says; -1 is off."
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = key("linear", HF, "Learning rate schedule, a step each PPO step.")
    warmup_ratio: Share = key(0.0, HF, "Share of the steps that warm up.")
    warmup_steps: Annotated[int, Field(ge=0)] = key(
        0, HF, "The same as a count; wins over the share."
    )
    weight_decay: NonNegative = key(0.0, HF, "AdamW's weight decay.")
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = key(0.9, HF, "AdamW's beta 1.")
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = key(0.999, HF, "AdamW's beta 2.")
    adam_epsilon: Above0 = key(1e-8, HF, "AdamW's epsilon; PPO's classic is 1e-5.")
    max_grad_norm: NonNegative = key(1.0, HF, "Gradient norm a role is clipped to; 0 is off.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = key(42, HF, "Seed of everything random.")
    bf16: bool = key(
        False,
        HF,
        "Models in bfloat16, compute under autocast; what trains stays float32. Without it on a "
        "GPU the checkpoint's own 16 bits, else float32.",
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
    optim: (
        Literal[
            "adamw_torch",
            "adamw_torch_fused",
            "adamw_8bit",
            "adamw_bnb_8bit",
            "paged_adamw_8bit",
            "paged_adamw_32bit",
        ]
        | None
    ) = key(
        None, HF, "AdamW: PyTorch's, or bitsandbytes' with 8-bit or paged state; null is PyTorch's."
    )
    disable_shuffling: bool = key(False, LF, "Take prompts in the order of the file.")
    logging_steps: Positive = key(10, HF, "Steps between log lines in stage rm; ppo prints each.")
    save_steps: Positive = key(500, HF, "Steps between checkpoints.")
    save_total_limit: Positive | None = key(None, HF, "Keep only so many checkpoints.")
    save_only_model: bool = key(False, HF, "In stage rm: checkpoints without optimiser state.")
    eval_strategy: Literal["no", "steps"] = key("no", HF, "steps evaluates every eval_steps.")
    eval_steps: Positive | None = key(None, HF, "See eval_strategy.")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = key(
        "none", HF, "Experiment tracker beside the files."
    )
    resume_from_checkpoint: bool | str | None = key(
        None, HF, "In stage ppo: a checkpoint folder, or true for the newest in output_dir."
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

    @model_validator(mode="after")
    def _belongs_together(self) -> Config:
        if self.do_train is False:
            raise ValueError("do_train: false leaves nothing to do; set it to true or leave it out")
        if self.do_predict:
            raise ValueError("do_predict: there is no predict here; leave it out")
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
        if self.stage == "rm" and self.resume_from_checkpoint:
            raise ValueError("resume_from_checkpoint: only stage ppo resumes; leave it out")
        for name in ("output_dir", "metrics_dir", "model_name_or_path", "dataset"):
            if not getattr(self, name).strip() or "\0" in getattr(self, name):
                raise ValueError(f"{name}: is empty or no path; give it a value")
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
        return self


# LLaMA-Factory's and transformers' keys that say nothing to a single process on one device.
IGNORED = {
    **TRL_IGNORED,
    "dataloader_num_workers": "records are encoded once, at the start",
    "dataloader_pin_memory": "records are encoded once, at the start",
    "buffer_size": "data is read whole",
    "data_shared_file_system": "one process",
    "ddp_find_unused_parameters": "one process",
    "ddp_timeout": "one process",
    "eval_num_beams": "a policy is sampled, not searched",
    "group_by_length": "micro-batches are trimmed to their longest row",
    "gradient_checkpointing": "as in LLaMA-Factory; use disable_gradient_checkpointing",
    "ignore_pad_token_for_loss": "padding never enters a loss",
    "include_num_input_tokens_seen": "tokens are counted in the metrics",
    "local_rank": "one process",
    "logging_dir": "trackers write below output_dir",
    "low_cpu_mem_usage": "always on",
    "media_dir": "data is text",
    "overwrite_cache": "nothing is cached",
    "plot_loss": "curves are always drawn",
    "predict_with_generate": "there is no predict here",
    "preprocessing_batch_size": "records are encoded once, at the start",
    "preprocessing_num_workers": "records are encoded once, at the start",
    "print_param_status": "the first lines of a run count what trains",
    "run_name": "trackers call the run fastppo",
    "save_safetensors": "always on",
    "save_strategy": "checkpoints go by save_steps",
    "skip_special_tokens": "always on for display",
    "use_cache": "sampling always uses a cache",
    "use_fast_tokenizer": "always on",
    "use_kv_cache": "sampling always uses a cache",
    "use_reentrant_gc": "checkpointing is never reentrant",
}
# Keys that ask for what is not done: the value that is harmless, and what to use instead.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "deepspeed": ((None,), "fastppo trains on one device; leave it out"),
    "eval_on_each_dataset": (
        (False, None),
        "evaluation is over all of eval_dataset together; evaluate one set a run",
    ),
    "fp16": ((False, None), "use bf16: true, or leave both out"),
    "fsdp": ((None, "", False), "fastppo trains on one device; leave it out"),
    "load_best_model_at_end": ((False, None), "PPO has no single best; leave it out"),
    "mask_history": ((False, None), "the loss is on the last response; leave it out"),
    "neat_packing": ((False, None), "responses are packed anyway; leave it out"),
    "num_beams": ((1, None), "a policy is sampled, not searched; leave it out"),
    "packing": ((False, None), "responses are packed anyway; leave it out"),
    "pissa_init": ((False, None), "the reference is the base with adapters off; leave it out"),
    "push_to_hub": ((False, None), "upload output_dir with the hub's own command"),
    "pure_bf16": ((False, None), "use bf16: true: adapters train in float32"),
    "streaming": ((False, None), "data is read whole; leave it out"),
    "tokenized_path": ((None,), "records are encoded at the start of each run; leave it out"),
    "tool_format": ((None,), "tool calls are not supported; leave it out"),
    "train_on_prompt": ((False, None), "the loss is on responses; leave it out"),
    "use_unsloth": ((False, None), "leave it out"),
}
# LLaMA-Factory's comma strings, which may be YAML lists too.
COMMA_LISTS = (
    *DATA_LISTS,
    "ptx_dataset",
    "lora_target",
    "reward_model",
    "reward_model_type",
    "reward_model_adapters",
    *ROLES_LISTS,
)
NOT_HERE = {
    **{
        ("stage", name): f"fastppo trains stage rm and stage ppo; for {name} use another trainer"
        for name in ("sft", "pt", "dpo", "kto")
    },
    ("finetuning_type", "oft"): "not supported; use finetuning_type: lora",
    ("kl_loss_type", "kl"): "its gradient is 0 on average; use low_var_kl or mse",
    ("kl_loss_type", "full"): "exact KL is for the reward (kl_penalty); use low_var_kl or mse",
    **{
        ("quantization_method", name): "not supported; use bnb, or leave it out"
        for name in ("gptq", "awq", "aqlm", "quanto", "eetq", "hqq", "mxfp4", "fp8")
    },
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and check a file; a UserError names the file, the key and the cure."""
    path = Path(path)
    data = read_file(path)
    data.update(parse_override(text) for text in overrides)
    return config_from_dict(data, source=str(path))


def config_from_dict(data: Mapping[Any, Any], source: str = "<python>") -> Config:
    """Check a mapping of keys."""
    given = {str(name): value for name, value in data.items()}
    ignored = []
    for alias, name in ALIASES.items():
        if alias in given and name in given:
            raise UserError(f"{source}: {alias}: is TRL's name for {name}; keep one of the two")
        if alias in given:
            given[name] = given.pop(alias)
    for name in list(given):
        if name in IGNORED:
            ignored.append(f"'{name}' means nothing here and is ignored: {IGNORED[name]}")
            del given[name]
        elif name in REFUSED:
            harmless, cure = REFUSED[name]
            if given.pop(name) not in harmless:
                raise UserError(f"{source}: {name}: not supported; {cure}")
        elif (name, given[name]) in ((k, v) for k, v in NOT_HERE):
            raise UserError(f"{source}: {name}: {given[name]}: {NOT_HERE[name, given[name]]}")
        elif name in ("source", "ignored") or name not in Config.model_fields:
            if os.environ.get("ALLOW_EXTRA_ARGS", "0").lower() in ("1", "true", "y"):
                ignored.append(f"'{name}' is unknown and ignored (ALLOW_EXTRA_ARGS)")
                del given[name]
                continue
            raise UserError(f"{source}: unknown key '{name}'; {suggest_key(name)}")
        elif given[name] is None and Config.model_fields[name].default is not None:
            # `key:` with nothing behind it, as tutorials leave them: the default.
            if Config.model_fields[name].is_required():
                raise UserError(f"{source}: {name}: has no value; give it one")
            del given[name]
    given = {name: _listed(name, value) for name, value in given.items()}
    for name, value in given.items():
        if isinstance(value, bool) and "bool" not in str(Config.model_fields[name].annotation):
            raise UserError(
                f"{source}: {name}: {str(value).lower()} is wrong; it should be a value"
            )
    try:
        return Config(**given, source=source, ignored=tuple(ignored))
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error)}") from None


def _listed(name: str, value: Any) -> Any:
    """A YAML list where LLaMA-Factory has a comma string; report_to as a list of one."""
    if name in COMMA_LISTS and isinstance(value, list):
        return ",".join(str(item) for item in value)
    if name == "reward_weights" and not isinstance(value, bool):
        if isinstance(value, str):
            return split(value)
        return [value] if isinstance(value, int | float) else value
    if name == "report_to" and isinstance(value, list) and len(value) == 1:
        return value[0]
    # YAML 1.1 reads `eval_strategy: no` as false.
    return "no" if name == "eval_strategy" and value is False else value


def suggest_key(name: str) -> str:
    """The cure for an unknown key."""
    if name in ELSEWHERE:
        return f"here that is {ELSEWHERE[name]}"
    known = [*(set(Config.model_fields) - {"source", "ignored"}), *IGNORED, *REFUSED]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return "docs/config.md lists the keys; take it out, or set ALLOW_EXTRA_ARGS=1 to ignore it"


def explain(error: ValidationError) -> str:
    """The first complaint, in one line, with what was wanted, what came, and the cure."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    name = str(first["loc"][0]) if first["loc"] else "configuration"
    if first["type"] == "missing":
        return f"{name}: missing; {Config.model_fields[name].description}"
    came = first["input"]
    if first["type"] == "literal_error":
        expected = first["ctx"]["expected"].replace("'", "")
        words = expected.replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches(str(came), words, n=1, cutoff=0.6)
        return f"{name}: {came!r} is none of {expected}" + (
            f"; did you mean {near[0]}?" if near else "; choose one of them"
        )
    wanted = first["msg"].removeprefix("Input should be ")
    wanted = wanted.split(", unable")[0]
    return f"{name}: {came!r} is wrong; it should be {wanted}"
