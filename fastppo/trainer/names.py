"""TRL's names of PPO's settings, in 0.9.6 and in 0.12 to 1.12, and what each became here.

docs/migrate-trl.md is made from these tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastppo.config import Config
from fastppo.errors import UserError

OLD, NEW, BOTH = "0.9.6", "0.12 to 1.12", "both"
NEEDED = "needed"


@dataclass(frozen=True)
class TrlName:
    """A setting of TRL's PPOConfig that has another name here, or none."""

    kind: Any  # its type
    versions: str
    default: Any  # TRL's; in both versions, that of 0.12 to 1.12
    here: str  # the key that it became; or, where it is none, what to know
    does: str = ""  # what differs


# Name -> the key that it became, with the same value.
RENAMED: dict[str, TrlName] = {
    "target": TrlName(float, OLD, 6, "ppo_target"),
    "whiten_rewards": TrlName(bool, BOTH, False, "ppo_whiten_rewards"),
    "num_ppo_epochs": TrlName(int, NEW, 4, "ppo_epochs"),
    "response_length": TrlName(int, NEW, 53, "max_new_tokens"),
    "local_rollout_forward_batch_size": TrlName(
        int, NEW, 64, "generation_batch", "sequences sampled at a time; null is all of them"
    ),
    "log_with": TrlName(str, OLD, None, "report_to"),
    "tracker_project_name": TrlName(str, OLD, "trl", "project"),
    "exp_name": TrlName(str, BOTH, "the script's name", "run_name"),
}
# Name -> what it becomes together with others; `translate` has the arithmetic.
COMPUTED: dict[str, TrlName] = {
    "kl_coef": TrlName(
        float, NEW, 0.05, "init_kl_coef", "with adap_kl_ctrl: false, as beta does not change"
    ),
    "kl_estimator": TrlName(str, NEW, "k1", "kl_penalty", "k1 is kl, k3 is low_var_kl"),
    "batch_size": TrlName(
        int, BOTH, None, "ppo_buffer_size", "the responses of a step, in optimiser steps"
    ),
    "mini_batch_size": TrlName(int, BOTH, None, "per_device_train_batch_size"),
    "forward_batch_size": TrlName(int, OLD, None, "per_device_train_batch_size"),
    "num_mini_batches": TrlName(
        int,
        NEW,
        1,
        "ppo_buffer_size",
        "optimiser steps of an epoch; the responses of a step stay as many",
    ),
    "steps": TrlName(int, OLD, 20000, "max_steps", "divided by the responses of a step"),
    "total_episodes": TrlName(int, NEW, None, "max_steps", "divided by the responses of a step"),
}
# Name -> what PPOTrainer does with it.
ARGUMENTS: dict[str, TrlName] = {
    "sft_model_path": TrlName(str, NEW, "EleutherAI/pythia-160m", "PPOTrainer(model=)"),
    "reward_model_path": TrlName(str, NEW, "EleutherAI/pythia-160m", "PPOTrainer(reward_model=)"),
    "stop_token": TrlName(str, NEW, None, "the template", "EOS always ends a response"),
    "stop_token_id": TrlName(
        int, NEW, None, "the template", "refused unless it is one of the tokens that end a response"
    ),
    "model_adapter_name": TrlName(str, NEW, None, "default", "the adapter that trains"),
    "ref_adapter_name": TrlName(
        str, NEW, None, "PPOTrainer(model=)", "the PeftModel's adapter that is the reference"
    ),
}
_COMPUTES = "computed, in TRL too: leave it out"
_TRACKING = "no part of training, in TRL too"
# Name -> why it does nothing here.
HARMLESS: dict[str, TrlName] = {
    "world_size": TrlName(int, BOTH, None, _COMPUTES),
    "num_total_batches": TrlName(int, NEW, None, _COMPUTES),
    "micro_batch_size": TrlName(int, NEW, None, _COMPUTES),
    "local_batch_size": TrlName(int, NEW, None, _COMPUTES),
    "local_mini_batch_size": TrlName(int, NEW, None, _COMPUTES),
    "backward_batch_size": TrlName(int, OLD, None, _COMPUTES),
    "global_backward_batch_size": TrlName(int, OLD, None, _COMPUTES),
    "global_batch_size": TrlName(int, OLD, None, _COMPUTES),
    "is_peft_model": TrlName(bool, OLD, None, _COMPUTES),
    "task_name": TrlName(str, OLD, None, _TRACKING),
    "model_name": TrlName(str, OLD, "gpt2", f"{_TRACKING}; the model is PPOTrainer(model=)"),
    "query_dataset": TrlName(
        str, OLD, "imdb", f"{_TRACKING}; the data is PPOTrainer(train_dataset=)"
    ),
    "reward_model": TrlName(
        str, OLD, "a classifier of imdb", f"{_TRACKING}; the reward is PPOTrainer(reward_model=)"
    ),
    "optimize_cuda_cache": TrlName(bool, OLD, None, "memory is given back where it helps"),
    "optimize_device_cache": TrlName(bool, OLD, False, "memory is given back where it helps"),
    "compare_steps": TrlName(int, OLD, 1, "push_to_hub uploads once, after training"),
    "dataset_num_proc": TrlName(int, NEW, None, "records are encoded once, at the start"),
    "num_sample_generations": TrlName(
        int, NEW, 10, "each evaluation writes samples: eval_strategy, eval_steps"
    ),
    "ds3_gather_for_generation": TrlName(bool, NEW, True, "a process has one device"),
}
# Name -> the cure; a value that is not empty is an error.
REFUSED: dict[str, TrlName] = {
    "tracker_kwargs": TrlName(
        dict, OLD, {}, "use report_to, run_name, project, and the tracker's variables"
    ),
    "accelerator_kwargs": TrlName(dict, OLD, {}, "use bf16, fp16, gradient_accumulation_steps"),
    "project_kwargs": TrlName(dict, OLD, {}, "use output_dir and logging_dir"),
    "push_to_hub_if_best_kwargs": TrlName(dict, OLD, {}, "use push_to_hub"),
    "is_encoder_decoder": TrlName(bool, OLD, None, "give a causal language model"),
}
TABLES = (RENAMED, COMPUTED, ARGUMENTS, HARMLESS, REFUSED)
NAMES: dict[str, TrlName] = {name: entry for table in TABLES for name, entry in table.items()}
# TRL's names that are keys here with the same meaning -> versions, and TRL's default.
SAME: dict[str, tuple[str, Any]] = {
    "learning_rate": (BOTH, "1.41e-5, 3e-6"),
    "seed": (BOTH, "0, 42"),
    "gradient_accumulation_steps": (BOTH, 1),
    "per_device_train_batch_size": (NEW, 8),
    "max_grad_norm": (BOTH, "null; not applied"),
    "gradient_checkpointing": (BOTH, "false, true"),
    "adap_kl_ctrl": (OLD, True),
    "init_kl_coef": (OLD, 0.2),
    "kl_penalty": (OLD, "kl"),
    "horizon": (OLD, 10000),
    "gamma": (BOTH, 1),
    "lam": (BOTH, 0.95),
    "cliprange": (BOTH, 0.2),
    "cliprange_value": (BOTH, 0.2),
    "vf_coef": (BOTH, 0.1),
    "ppo_epochs": (OLD, 4),
    "early_stopping": (OLD, False),
    "target_kl": (OLD, 1),
    "ratio_threshold": (OLD, 10.0),
    "use_score_scaling": (OLD, False),
    "use_score_norm": (OLD, False),
    "score_clip": (OLD, None),
    "temperature": (NEW, 0.7),
    "missing_eos_penalty": (NEW, None),
}
ESTIMATORS = {"k1": "kl", "k3": "low_var_kl"}


class Keys:
    """Keys by name, with where each came from: two sources must agree."""

    def __init__(self, own: Mapping[str, Any]) -> None:
        self.values = dict(own)
        self.sources = {name: name for name in own}

    def set(self, name: str, value: Any, source: str) -> None:
        """Set a key; `source` is the setting that asks for the value."""
        if name in self.values and self.values[name] != value:
            other = self.sources[name]
            said = f"{other}: {self.values[name]}"
            if other != name:
                said += f" (which is {name}: {self.values[name]})"
            raise UserError(
                f"PPOConfig: {source} means {name}: {value}, and {said} is given too; keep one"
            )
        self.values[name] = value
        self.sources[name] = source


def translate(given: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The keys that TRL's names in `given` mean beside the keys in `own`.

    Returns:
        All keys, and a line on what each of TRL's names became.

    Raises:
        UserError: a name that is not supported, or two names that disagree.
    """
    keys, lines = Keys(own), list[str]()
    for name, value in given.items():
        if name in REFUSED and value:
            raise UserError(f"PPOConfig: {name}: not supported; {REFUSED[name].here}")
        if name == "world_size" and value != 1:
            raise UserError("PPOConfig: world_size: fastppo is one process on one device; use 1")
        if name in RENAMED:
            key = RENAMED[name].here
            keys.set(key, value, name)
            lines.append(f"{name} is TRL's name, and read as {key}: {value}")
        elif name in HARMLESS and name != "world_size":
            lines.append(f"{name} is TRL's, and does nothing here: {HARMLESS[name].here}")
    if (value := given.get("kl_coef")) is not None:
        keys.set("init_kl_coef", value, "kl_coef")
        keys.set("adap_kl_ctrl", False, "kl_coef")
        lines.append(
            f"kl_coef is TRL's name, and read as init_kl_coef: {value} with adap_kl_ctrl: False"
        )
    if (value := given.get("kl_estimator")) is not None:
        if value not in ESTIMATORS:
            raise UserError(f"PPOConfig: kl_estimator: {value!r} is neither k1 nor k3; use one")
        keys.set("kl_penalty", ESTIMATORS[value], "kl_estimator")
        lines.append(f"kl_estimator is TRL's name, and read as kl_penalty: {ESTIMATORS[value]}")
    responses = set_batches(keys, given, lines)
    for name in ("steps", "total_episodes"):
        if (value := given.get(name)) is not None:
            steps = math.ceil(value / responses)
            keys.set("max_steps", steps, name)
            lines.append(
                f"{name} is TRL's name, and read as max_steps: {steps} ({value} responses, "
                f"{responses} a step)"
            )
    check_stop_token(given, lines)
    return keys.values, lines


def check_stop_token(given: Mapping[str, Any], lines: list[str]) -> None:
    """Check `stop_token`, which can only be eos, as in TRL."""
    value = given.get("stop_token")
    if value is None:
        return
    if value != "eos":
        raise UserError(
            f"PPOConfig: stop_token: {value!r} is not eos; a template has further stop tokens"
        )
    if given.get("stop_token_id") is not None:
        raise UserError("PPOConfig: stop_token and stop_token_id are both given; keep one")
    lines.append("stop_token is TRL's, and does nothing here: EOS always ends a response")


def set_batches(keys: Keys, given: Mapping[str, Any], lines: list[str]) -> int:
    """Set the keys of a step's batches; returns the number of responses of a step."""

    def key(name: str) -> int:
        return int(keys.values.get(name, Config.model_fields[name].default))

    whole, parts = given.get("batch_size"), given.get("num_mini_batches")
    mini = same(given, "mini_batch_size", "forward_batch_size")
    rows = key("per_device_train_batch_size") * key("gradient_accumulation_steps")
    if parts is not None:
        split_rollout(keys, key, rows, parts, lines)
        check_agrees("batch_size", whole, rows)
        check_agrees("mini_batch_size", mini, rows // parts)
    else:
        if mini is not None:
            name = "mini_batch_size" if "mini_batch_size" in given else "forward_batch_size"
            keys.set("per_device_train_batch_size", mini, name)
            lines.append(f"{name} is TRL's name, and read as per_device_train_batch_size: {mini}")
        rows = key("per_device_train_batch_size") * key("gradient_accumulation_steps")
        if whole is not None:
            if whole % rows:
                raise UserError(
                    f"PPOConfig: batch_size: {whole} is no multiple of the {rows} responses of an "
                    "optimiser step (per_device_train_batch_size x gradient_accumulation_steps); "
                    "change one of them"
                )
            keys.set("ppo_buffer_size", whole // rows, "batch_size")
            lines.append(
                f"batch_size is TRL's name, and read as ppo_buffer_size: {whole // rows} "
                f"optimiser steps of {rows} responses"
            )
    rows = key("per_device_train_batch_size") * key("gradient_accumulation_steps")
    return rows * key("ppo_buffer_size")


def split_rollout(keys: Keys, key: Any, rows: int, parts: int, lines: list[str]) -> None:
    """Set the keys for `num_mini_batches: parts` of a rollout of `rows` responses."""
    if parts < 1 or rows % parts:
        raise UserError(
            f"PPOConfig: num_mini_batches: {parts} does not divide the {rows} responses of a step "
            "(per_device_train_batch_size x gradient_accumulation_steps); change one of them"
        )
    size, most = rows // parts, key("per_device_train_batch_size")
    micro = max(x for x in range(1, min(size, most) + 1) if size % x == 0)
    keys.set("ppo_buffer_size", parts, "num_mini_batches")
    if parts == 1:
        return
    # They are TRL's, whose rollout they describe.
    keys.values["per_device_train_batch_size"] = micro
    keys.values["gradient_accumulation_steps"] = size // micro
    lines.append(
        f"num_mini_batches is TRL's name, and read as ppo_buffer_size: {parts} with "
        f"per_device_train_batch_size: {micro} and gradient_accumulation_steps: {size // micro}"
    )


def same(given: Mapping[str, Any], *names: str) -> Any:
    """The value of two names for one setting, None if neither is given."""
    found = {name: given[name] for name in names if given.get(name) is not None}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{name}: {value}" for name, value in found.items())
        raise UserError(f"PPOConfig: {said} are one setting; keep one")
    return next(iter(found.values()), None)


def check_agrees(name: str, value: int | None, computed: int) -> None:
    """Check a value that TRL computes itself."""
    if value is not None and value != computed:
        raise UserError(
            f"PPOConfig: {name}: {value} disagrees with num_mini_batches, "
            f"per_device_train_batch_size and gradient_accumulation_steps, which make it "
            f"{computed}; leave it out"
        )


def given_names(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The names that have a value."""
    return {name: values[name] for name in names if values.get(name) is not None}
