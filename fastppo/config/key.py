"""What every key of the configuration is made of: default, owner, sentence and range; and groups of
keys.
"""

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
# Owners of what neither LLaMA-Factory nor TRL 0.9.6 has a name for.
TRL24, GRPO, VERL, OPENRLHF, TUNE = "TRL 0.24", "TRL (GRPO)", "verl", "OpenRLHF", "torchtune"


def key(default: Any, owner: str, meaning: str, *, first: bool = False) -> Any:
    """A key with its default, whose name it is, and a sentence on what it does here.

    `first` marks the few keys that --help and docs/config.md begin with.
    """
    extra: dict[str, Any] = {"owner": owner, "first": True} if first else {"owner": owner}
    return Field(default, description=meaning, json_schema_extra=extra)


Stage = Literal["rm", "ppo"]


class Keys(BaseModel):
    """A group of keys: docs/config.md has a table of each, under its title."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    title: ClassVar[str]
    own_stage: ClassVar[Stage | None] = None  # the one stage that has a use for them
