"""Keys of the rewards, and the rewards that they name: kind, target, weight and name of each.

No torch here.
"""

from __future__ import annotations

import difflib
import keyword
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, ClassVar, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from fastppo.config.key import LF, OWN, Finite, Keys, Stage, key

Kind = Literal["lora", "full", "api", "function"]
RECORD = "fastppo_reward.json"  # stage rm's record, saved with its adapter and head
BASE_RECORD = "fastppo_base.json"  # names the adapters that were merged into an adapter's base
TEXT_RECORD = "fastppo_template.json"  # how conversations were formatted in training
HEAD_FILES = ("value_head.safetensors", "value_head.bin")  # LLaMA-Factory's names, in its order


class RewardKeys(Keys):
    """Keys of the rewards that score the policy's responses."""

    title = "Rewards (stage ppo)"
    own_stage: ClassVar[Stage | None] = "ppo"

    reward_model: str | None = key(
        None,
        LF,
        "Folder, hub name, URL or module:function, as reward_model_type says; a list for several "
        "rewards.",
        first=True,
    )
    reward_model_type: str = key(
        "lora",
        LF,
        "lora, full, api or function (docs/rewards.md); a list for several rewards.",
        first=True,
    )
    reward_weights: tuple[Finite, ...] | None = key(
        None, OWN, "A weight for each reward; null is 1 for each."
    )
    reward_model_adapters: str | None = key(
        None,
        LF,
        "Adapters that are merged into a reward of type full, comma separated, in their order.",
    )
    reward_model_quantization_bit: Literal[4, 8] | None = key(
        None, LF, "Quantise a reward of type full to this number of bits, with bitsandbytes."
    )
    reward_api_timeout: Annotated[float, Field(gt=0.0, le=86400.0)] = key(
        60.0, OWN, "Seconds in which a reward of type api must answer; then the attempt has failed."
    )
    reward_api_retries: Annotated[int, Field(ge=0, le=100)] = key(
        5,
        OWN,
        "Number of attempts after the first; the waits between them double from half a second "
        "up to 30.",
    )

    @model_validator(mode="after")
    def _types_are_known(self) -> RewardKeys:
        for kind in split(self.reward_model_type):
            check_kind(kind)
        return self


@dataclass(frozen=True)
class RewardSpec:
    """One reward of a run."""

    kind: Kind
    target: str  # a folder or hub name, a URL, or module:function
    weight: float
    name: str  # its name in metrics and samples


def split(text: str) -> list[str]:
    """The items of a comma-separated list."""
    return [item.strip() for item in text.split(",")]


def reward_specs(
    targets: str, kinds: str, weights: Sequence[float] | None
) -> tuple[RewardSpec, ...]:
    """The rewards that `reward_model`, `reward_model_type` and `reward_weights` name.

    A single type applies to all rewards.

    Raises:
        ValueError: the lists do not match; the message has key, value and cure.
    """
    target_list, kind_list = split(targets), split(kinds)
    if not all(target_list):
        raise ValueError("reward_model: has nothing between two commas; name a reward there")
    if len(kind_list) == 1:
        kind_list *= len(target_list)
    if len(kind_list) != len(target_list):
        raise ValueError(
            f"reward_model_type: {len(kind_list)} types for {len(target_list)} rewards in "
            "reward_model; give one for each, or one for all"
        )
    weight_list = [1.0] * len(target_list) if weights is None else list(weights)
    if len(weight_list) != len(target_list):
        raise ValueError(
            f"reward_weights: {len(weight_list)} weights for {len(target_list)} rewards in "
            "reward_model; give one for each"
        )
    specs: list[RewardSpec] = []
    for target, given, weight in zip(target_list, kind_list, weight_list, strict=True):
        kind = check_kind(given)
        if kind == "api":
            check_url(target)
        if kind == "function":
            check_function_name(target, "reward_model")
        name = short_name(kind, target)
        taken = {spec.name for spec in specs}
        number = 2
        while name in taken:
            name = f"{short_name(kind, target)}_{number}"
            number += 1
        specs.append(RewardSpec(kind, target, weight, name))
    return tuple(specs)


def short_name(kind: Kind, target: str) -> str:
    """A reward's name: the function's, the last part of a folder or hub name, or `api`."""
    if kind == "api":
        return "api"
    if kind == "function":
        return target.partition(":")[2]
    return PurePath(target).name or target


def check_kind(given: str) -> Kind:
    """Check that `given` is a kind of reward; raises a ValueError that suggests the nearest."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    for kind in kinds:
        if given == kind:
            return kind
    near = difflib.get_close_matches(given, kinds, n=1, cutoff=0.6)
    cure = f"did you mean {near[0]}?" if near else "choose one of them"
    raise ValueError(f"reward_model_type: '{given}' is none of {', '.join(kinds)}; {cure}")


def check_function_name(name: str, key: str) -> None:
    """Check that `name` is `module:function` and can be imported: a path to a file cannot."""
    module, _, function = name.partition(":")
    parts = [*module.split("."), function]
    named = all(part.isidentifier() and not keyword.iskeyword(part) for part in parts)
    if not named or module.endswith(".py"):
        raise ValueError(
            f"{key}: '{name}' is not module:function with importable names; write for example "
            "mine.rewards:short"
        )


def check_url(
    url: str,
    *,
    key: str = "reward_model",
    token: str = "FASTPPO_REWARD_TOKEN",
    example: str = "http://127.0.0.1:8000/v1/score/evaluation",
) -> None:
    """Check that a URL is http or https, names a host, and has no password in it.

    Raises:
        ValueError: the message has `key`, and `example` or the variable `token` as the cure.
    """
    # The error shows neither the query nor what may be a password.
    shown = url.partition("?")[0].partition("#")[0].rpartition("@")[2]
    cure = f"write for example {example}"
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError(f"{key}: this URL cannot be read; {cure}") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"{key}: this URL holds a user name or password, which would end in logs; leave it out "
            f"and set the environment variable {token}"
        )
    try:
        parts.port  # noqa: B018 - raises if the port is no number
    except ValueError:
        raise ValueError(f"{key}: the port in this URL is no number; {cure}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{key}: '{shown}' is no http(s) URL; {cure}")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"{key}: {shown!r} has characters that a URL cannot have; {cure}")


def without_query(url: str) -> str:
    """The URL without its query, which can be a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"
