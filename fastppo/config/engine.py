"""Keys of rollouts by vLLM, and other trainers' names of the correction for its log-probs.

No torch here.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field

from fastppo.config.key import GRPO, OWN, Keys, Stage, key
from fastppo.config.rewards import check_url
from fastppo.errors import UserError

if TYPE_CHECKING:
    from fastppo.config.schema import Config

TOKEN = "VLLM_API_KEY"  # the variable that vLLM's server itself reads its key from
ADDRESS = "http://127.0.0.1:8000"


class EngineKeys(Keys):
    """Keys of rollouts by an engine in place of the trainer's own sampler."""

    title = "Rollouts by vLLM (stage ppo)"
    own_stage: ClassVar[Stage | None] = "ppo"

    use_vllm: bool = key(
        False,
        GRPO,
        "Sample responses by vLLM, which is sent the adapter before each step (docs/rollouts.md).",
    )
    vllm_mode: Literal["server", "colocate"] = key(
        "server",
        GRPO,
        "server: vLLM runs as a server of its own. colocate (experimental): the run starts vLLM on "
        "its own device, beside the trainer.",
    )
    vllm_server_base_url: str = key(
        ADDRESS,
        GRPO,
        "Address of the server; its key is read from the environment variable VLLM_API_KEY.",
    )
    vllm_server_timeout: Annotated[float, Field(gt=0.0, le=86400.0)] = key(
        240.0,
        GRPO,
        "Seconds in which each request must be answered; then the attempt has failed. With "
        "colocate, seconds of each 256 responses of a rollout; then the run stops. vLLM has 1800 "
        "seconds to start, or this if it is more.",
    )
    vllm_adapter_dir: str | None = key(
        None,
        OWN,
        "Folder for the adapter, which server and trainer see under the same path; null is "
        "/dev/shm, or the system's folder for temporary files, for a server on this machine.",
    )
    vllm_gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = key(
        0.3,
        GRPO,
        "With colocate: share of the device's memory that vLLM takes for its copy of the base and "
        "its cache; on a CPU of the machine's memory.",
    )
    vllm_enable_sleep_mode: bool = key(
        False,
        GRPO,
        "With colocate on a GPU: between rollouts vLLM's base waits in host memory, and its cache "
        "is given back.",
    )
    vllm_tensor_parallel_size: Annotated[int, Field(ge=1)] = key(
        1, GRPO, "With colocate: number of GPUs that vLLM splits its copy of the base over."
    )


def check_engine(config: Config) -> None:
    """Raise ValueError, with key and cure, if the settings rule out rollouts by vLLM."""
    if config.rollout_is_lower is not None and config.importance_mode is None:
        raise ValueError(
            "rollout_is_lower: bounds the weights of rollout_is; set that too, or leave it out"
        )
    low, high = config.importance_bounds
    if low is not None and low > high:
        raise ValueError(
            f"rollout_is_lower: {low:g} is above rollout_is_threshold ({high:g}); lower it"
        )
    if not config.use_vllm or config.stage != "ppo":
        return
    beside = config.vllm_mode == "colocate"
    who = "vLLM" if beside else "the server"
    sent = f"use_vllm: {who} is sent an adapter before each step, and"
    if config.finetuning_type != "lora":
        raise ValueError(
            f"{sent} finetuning_type: {config.finetuning_type} trains the model itself; use "
            "finetuning_type: lora"
        )
    if config.use_dora:
        raise ValueError(f"{sent} vLLM runs none with use_dora: true; leave it out, or use_dora")
    if config.additional_target is not None:
        raise ValueError(
            f"{sent} the modules of additional_target are no part of it; leave it out, or "
            "additional_target"
        )
    if beside:
        check_beside(config)
    else:
        check_address(config)


def check_beside(config: Config) -> None:
    """Raise ValueError if vLLM beside the trainer would load another base than the trainer's."""
    loads = "vllm_mode: colocate: vLLM loads model_name_or_path as it is, and"
    if config.quantization_bit is not None:
        raise ValueError(
            f"{loads} quantization_bit: {config.quantization_bit} changes the trainer's; leave one "
            "of them out, or use vllm_mode: server"
        )
    folders = config.adapter_name_or_path
    if folders is not None and (config.create_new_adapter or "," in folders):
        raise ValueError(
            f"{loads} the trainer merges {folders} into its own; merge it with fastppo-export and "
            "name the result in model_name_or_path, or use vllm_mode: server"
        )


def check_address(config: Config) -> None:
    """Raise ValueError if the server's address lacks something, or has too much."""
    url = config.vllm_server_base_url
    check_url(url, key="vllm_server_base_url", token=TOKEN, example=ADDRESS)
    parts = urlsplit(url)
    if parts.query or parts.fragment or parts.path not in ("", "/"):
        raise ValueError(
            f"vllm_server_base_url: has more than an address; write for example {ADDRESS}"
        )
    if is_this_machine(parts.hostname or ""):
        return
    if config.vllm_adapter_dir is None:
        raise ValueError(
            f"vllm_adapter_dir: the server is on {parts.hostname}, not on this machine; name a "
            "folder that both see under the same path"
        )
    if not os.environ.get(TOKEN):
        raise ValueError(
            f"vllm_server_base_url: {parts.hostname} is not this machine, so its server needs a "
            f"key; set the environment variable {TOKEN} for both"
        )


def is_this_machine(host: str) -> bool:
    """Whether a host's name is of this machine: localhost, or a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# TRL's name of the correction -> the key here.
TRL_IMPORTANCE = {
    "vllm_importance_sampling_correction": "rollout_is",
    "vllm_importance_sampling_mode": "rollout_is",
    "vllm_importance_sampling_clip_max": "rollout_is_threshold",
    "vllm_importance_sampling_cap": "rollout_is_threshold",
    "vllm_importance_sampling_clip_min": "rollout_is_lower",
}
TRL_MODE, TRL_CAP = "sequence_mask", 3.0  # TRL's defaults, where one of its names is set
# verl's levels of rollout_is, whose weights are truncated.
VERL_LEVELS = {"token": "token_truncate", "sequence": "sequence_truncate"}


def with_importance_names(
    given: Mapping[str, Any], source: str
) -> tuple[dict[str, Any], list[str]]:
    """`given` with TRL's and verl's names of the correction as keys here, and a line for each.

    Raises:
        UserError: a name and the key that it stands for are both given.
    """
    found, lines = dict(given), []
    level = found.get("rollout_is")
    if isinstance(level, str) and level in VERL_LEVELS:
        found["rollout_is"] = VERL_LEVELS[level]
        lines.append(f"'rollout_is: {level}' is verl's, and read as {found['rollout_is']}")
    names = {name: found.pop(name) for name in TRL_IMPORTANCE if name in found}
    names = {name: value for name, value in names.items() if value is not None}
    if not names:
        return found, lines
    meant: dict[str, Any] = {"rollout_is": TRL_MODE, "rollout_is_threshold": TRL_CAP}
    for name, value in names.items():
        if found.get(TRL_IMPORTANCE[name]) is not None:
            raise UserError(
                f"{source}: {name}: is TRL's name for {TRL_IMPORTANCE[name]}; keep one of the two"
            )
        if name != "vllm_importance_sampling_correction":
            meant[TRL_IMPORTANCE[name]] = value
    if names.get("vllm_importance_sampling_correction") is False:
        meant = {"rollout_is": "none"}
    found |= {name: value for name, value in meant.items() if found.get(name) is None}
    words = ", ".join(f"{name}: {value}" for name, value in meant.items())
    for name in names:
        lines.append(f"'{name}' is TRL's, and read as {words}")
    return found, lines
