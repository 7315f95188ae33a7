"""What every key of the configuration is made of: default, owner, sentence and range."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

Positive = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

LF, HF, TRL, OWN = "LLaMA-Factory", "transformers", "TRL 0.9.6", "fastppo"
# Owners of what neither LLaMA-Factory nor TRL 0.9.6 has a name for.
TRL24, GRPO, VERL, OPENRLHF, TUNE = "TRL 0.24", "TRL (GRPO)", "verl", "OpenRLHF", "torchtune"


def key(default: Any, owner: str, meaning: str) -> Any:
    """A key with its default, whose name it is, and a sentence on what it does here."""
    return Field(default, description=meaning, json_schema_extra={"owner": owner})
