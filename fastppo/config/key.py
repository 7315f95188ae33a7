"""The definition of a configuration key (default, owner, description, range), and of key groups."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

LF, HF, TRL, OWN = "LLaMA-Factory", "transformers", "TRL 0.9.6", "fastppo"
# Owners of key names that neither LLaMA-Factory nor TRL 0.9.6 has.
TRL24, GRPO, VERL, OPENRLHF, TUNE = "TRL 0.24", "TRL (GRPO)", "verl", "OpenRLHF", "torchtune"


def key(default: Any, owner: str, meaning: str, *, first: bool = False) -> Any:
    """A key with its default, the owner of its name, and a description of what it does here.

    `first` marks the few keys that --help and docs/config.md show first.
    """
    extra: dict[str, Any] = {"owner": owner, "first": True} if first else {"owner": owner}
    return Field(default, description=meaning, json_schema_extra=extra)


Stage = Literal["rm", "ppo"]


class Keys(BaseModel):
    """A group of keys; docs/config.md has a table for each group, under the group's title."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    title: ClassVar[str]
    own_stage: ClassVar[Stage | None] = None  # the only stage that uses the keys
