"""What several processes share out: a step's prompts (in stage rm pairs), with `fsdp` the base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fastppo.config.file import read_json
from fastppo.config.memory import offload_mode
from fastppo.errors import UserError

if TYPE_CHECKING:
    from fastppo.config.schema import Config

# Keys of runs of one process.
ALONE: Final = ("use_vllm", "filter_groups", "load_best_model_at_end")
# Words of transformers' `fsdp` that say what is done: each decoder layer is sharded.
FSDP_WORDS: Final = ("full_shard", "auto_wrap", "true")
# Settings of `fsdp_config`, without the prefix fsdp_ -> the values that say what is done.
FSDP_VALUES: Final[dict[str, tuple[str, ...]]] = {
    "version": ("2",),
    "reshard_after_forward": ("true", "full_shard"),
    "sharding_strategy": ("full_shard", "1"),
    "cpu_offload": ("false",),
    "offload_params": ("false",),
    "xla": ("false",),
    "xla_fsdp_v2": ("false",),
    "xla_fsdp_grad_ckpt": ("false",),
}
# Those that change nothing here: how layers are found, loaded and saved, and what is recomputed.
FSDP_IDLE: Final = (
    "activation_checkpointing",
    "auto_wrap_policy",
    "backward_prefetch",
    "cpu_ram_efficient_loading",
    "forward_prefetch",
    "limit_all_gathers",
    "min_num_params",
    "state_dict_type",
    "sync_module_states",
    "transformer_layer_cls_to_wrap",
    "use_orig_params",
)
# Keys that do not go with `fsdp`, those of their values that do, and why.
FSDP_WITHOUT: Final[dict[str, tuple[tuple[Any, ...], str]]] = {
    "finetuning_type": (("lora",), "a frozen base is sharded, and this one trains"),
    "critic_finetuning_type": ((None, "lora"), "a frozen base is sharded, and this one trains"),
    "quantization_bit": ((None,), "weights of few bits are not sharded"),
    "ref_model_quantization_bit": ((None,), "weights of few bits are not sharded"),
    "additional_target": ((None,), "modules that train whole are not sharded"),
    "use_dora": ((False,), "its norms were not tried on sharded weights"),
    "use_vllm": ((False,), "its server has the whole base"),
    "rollout_merge_adapter": ((None, False), "a merged copy is of whole weights"),
    "cache_implementation": (("dynamic",), "compiled decoding was not tried on sharded weights"),
    "stream_frozen": ((False,), "layers are either streamed or sharded"),
}


def units_a_step(config: Config) -> tuple[int, str]:
    """The number of prompts of a PPO step, in stage rm of pairs of an optimiser step; and which."""
    if config.stage == "ppo":
        return config.prompts_a_step, "prompts"
    return config.per_device_train_batch_size * config.gradient_accumulation_steps, "pairs"


def fsdp_settings(config: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """`fsdp_config`, or the JSON file that it names, without the prefix that its keys may have."""
    if isinstance(config, str):
        if not os.path.isfile(config):  # no error for a name that no file can have
            raise ValueError(f"fsdp_config: no file {config[:200]}; check the path")
        config = read_json(Path(config), "fsdp_config")
    return {str(name).removeprefix("fsdp_"): value for name, value in (config or {}).items()}


def check_fsdp(value: bool | str, settings: Mapping[str, Any]) -> None:
    """Check that transformers' `fsdp` and `fsdp_config` ask for what is done here.

    Raises:
        ValueError: what they ask for is not done, or unknown.
    """
    for word in str(value).lower().replace(",", " ").split():
        if word not in FSDP_WORDS:
            raise ValueError(
                f"fsdp: {word[:80]}: not supported; use fsdp: full_shard, or leave it out"
            )
    for name, wanted in settings.items():
        if name in FSDP_IDLE:
            continue
        if name not in FSDP_VALUES:
            known = ", ".join(FSDP_VALUES)
            raise ValueError(
                f"fsdp_config: {name[:80]}: is unknown; take it out, or use one of {known}"
            )
        words = FSDP_VALUES[name]
        if (given := str(wanted).lower()) not in words:
            raise ValueError(f"fsdp_config: {name}: {given[:80]}: not supported; use {words[0]}")


def check_sharding(config: Config) -> None:
    """Check that nothing in the configuration needs the whole base, where `fsdp` shards it.

    Raises:
        ValueError: a key does; the message names it and the cure.
    """
    if not config.shards:
        return
    if config.stage != "ppo":
        raise ValueError("fsdp: is for stage ppo; leave it out")
    for name, (values, why) in FSDP_WITHOUT.items():
        value = getattr(config, name)
        if value not in values:
            shown = str(value).lower() if isinstance(value, bool) else value
            raise ValueError(
                f"fsdp: does not go with {name}: {shown}: {why}; leave one of them out"
            )
    kinds = {spec.kind for spec in config.rewards}
    if "full" in kinds:
        raise ValueError(
            "fsdp: does not go with reward_model_type: full, a model that each process would have "
            "whole; serve it (reward_model_type: api), or leave fsdp out"
        )
    if "lora" in kinds and len(kinds) > 1:
        raise ValueError(
            "fsdp: reward_model_type: lora does not go with other kinds of rewards then: where one "
            "of those fails in a process, the others would wait for its pass; leave fsdp out"
        )
    mode = offload_mode(config)
    if "offload" in mode:
        raise ValueError(
            f"fsdp: activation_offloading: {mode} was not tried on sharded layers; use "
            "activation_offloading: checkpoint"
        )


def check_processes(config: Config, processes: int, name: str) -> None:
    """Check that a step has a prompt (or a pair) for each process.

    Args:
        config: the run's.
        processes: how many there are.
        name: the variable or option that says so.

    Raises:
        UserError: there are more processes than prompts, or several with a key of `ALONE`.
    """
    for key in ALONE:
        if processes > 1 and getattr(config, key):
            raise UserError(
                f"{name}: is {processes}, and {key} is for runs of one process; start one, or "
                f"leave {key} out"
            )
    count, what = units_a_step(config)
    if count < processes:
        more = " or ppo_buffer_size" if config.stage == "ppo" else ""
        raise UserError(
            f"{name}: is {processes}, and a step has {count} {what}, so a process would have none; "
            f"start {count}, or raise gradient_accumulation_steps{more}"
        )
