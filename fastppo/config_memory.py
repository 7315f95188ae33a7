"""Keys on how much memory a phase wants, and what the plan decides of it. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from fastppo.config_key import OWN, Positive, key

Auto = Literal["auto"]  # by the memory plan: the fastest that fits


class MemoryKeys(BaseModel):
    """The part of a run that decides how much memory its phases want, and not what they learn."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    chunk_bytes: Positive | Auto | None = key(
        None,
        OWN,
        "Bytes of logits that exist at a time; null is 512 MiB on a GPU, and on a CPU 80 MiB or "
        "128 rows, auto that or what fits.",
    )
    generation_batch: Positive | Auto | None = key(
        None,
        OWN,
        "Most sequences that are sampled at a time; auto is as many of a rollout as fit, null all.",
    )
