"""What the registered operators take besides logits or hidden states: tensors and scalars alone.

A schema of torch.library holds no dataclass and no value that is a float or a tensor. The public
functions put what they are given into these dataclasses; `flat` is their schema's order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastppo.ops.config import PolicyLossConfig
from fastppo.ops.rows import RowSpec, row_spec
from fastppo.ops.surrogate import PolicyInputs


def split(value: float | Tensor) -> tuple[Tensor | None, float]:
    """A float or tensor as the two arguments that a schema needs for it."""
    return (value.detach(), 1.0) if isinstance(value, Tensor) else (None, value)


def join(tensor: Tensor | None, value: float) -> float | Tensor:
    """The inverse of `split`."""
    return value if tensor is None else tensor


@dataclass(frozen=True)
class RowArguments:
    """What a row of logits needs to become a log-prob."""

    token_N: Tensor
    temperature_tensor: Tensor | None
    temperature: float
    softcap: float | None
    ignore_index: int

    SCHEMA: ClassVar[str] = (
        "Tensor token_N, Tensor? temperature_tensor, float temperature, float? softcap, "
        "int ignore_index"
    )

    def flat(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def spec(self, live_N: Tensor, dtype: torch.dtype) -> RowSpec:
        """The same for the definition, whose rows that are not live hold finite filler."""
        tau = join(self.temperature_tensor, self.temperature)
        return row_spec(self.token_N, live_N, tau, self.softcap, dtype)


def row_arguments(
    token_N: Tensor, temperature: float | Tensor, softcap: float | None, ignore_index: int
) -> RowArguments:
    return RowArguments(token_N, *split(temperature), softcap, ignore_index)


@dataclass(frozen=True)
class LossArguments:
    """What a row needs besides to become PPO's loss."""

    rows: RowArguments
    behaviour_logprob_N: Tensor
    advantage_N: Tensor
    weight_N: Tensor
    ref_logprob_N: Tensor | None
    importance_weight_N: Tensor | None
    offsets: Tensor | None
    kl_coef_tensor: Tensor | None
    kl_coef: float
    entropy_coef_tensor: Tensor | None
    entropy_coef: float
    grad_scale_tensor: Tensor | None
    grad_scale: float
    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_kind: str
    ratio_level: str
    log_ratio_limit: float

    SCHEMA: ClassVar[str] = (
        f"{RowArguments.SCHEMA}, Tensor behaviour_logprob_N, Tensor advantage_N, Tensor weight_N, "
        "Tensor? ref_logprob_N, Tensor? importance_weight_N, Tensor? offsets, "
        "Tensor? kl_coef_tensor, float kl_coef, Tensor? entropy_coef_tensor, float entropy_coef, "
        "Tensor? grad_scale_tensor, float grad_scale, float clip_low, float clip_high, "
        "float? dual_clip, str kl_kind, str ratio_level, float log_ratio_limit"
    )
    COUNT: ClassVar[int] = 5 + 18

    def flat(self) -> tuple[Any, ...]:
        mine = (getattr(self, field.name) for field in fields(self) if field.name != "rows")
        return (*self.rows.flat(), *mine)

    @classmethod
    def of(cls, flat: tuple[Any, ...]) -> LossArguments:
        """From the values of the schema."""
        return cls(RowArguments(*flat[:5]), *flat[5:])

    @property
    def by_sequence(self) -> bool:
        return self.ratio_level == "sequence"

    @property
    def has_entropy(self) -> bool:
        """Whether the entropy may have a weight; a tensor is never asked."""
        return self.entropy_coef_tensor is not None or self.entropy_coef != 0

    @property
    def scale(self) -> float | Tensor:
        return join(self.grad_scale_tensor, self.grad_scale)

    def live_N(self) -> Tensor:
        return (self.weight_N != 0) & (self.rows.token_N != self.rows.ignore_index)

    def prepare(self, dtype: torch.dtype) -> tuple[RowSpec, PolicyInputs]:
        """The same for the definition: rows that are not live get finite filler."""
        live_N = self.live_N()

        def filled(tensor: Tensor) -> Tensor:
            return torch.where(live_N, tensor, 0).to(dtype)

        def coefficient(tensor: Tensor | None, value: float) -> float | Tensor:
            return value if tensor is None else tensor.to(dtype)

        ref, importance = self.ref_logprob_N, self.importance_weight_N
        config = PolicyLossConfig(
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            kl_kind=self.kl_kind,
            ratio_level=self.ratio_level,
            log_ratio_limit=self.log_ratio_limit,
        )
        inputs = PolicyInputs(
            behaviour_logprob_N=filled(self.behaviour_logprob_N),
            advantage_N=filled(self.advantage_N),
            weight_N=filled(self.weight_N),
            live_N=live_N,
            ref_logprob_N=None if ref is None else filled(ref),
            importance_weight_N=None if importance is None else filled(importance),
            kl_coef=coefficient(self.kl_coef_tensor, self.kl_coef),
            entropy_coef=coefficient(self.entropy_coef_tensor, self.entropy_coef),
            config=config,
            offsets=self.offsets,
        )
        return self.rows.spec(live_N, dtype), inputs
