"""Settings of a policy loss and an output head, besides the tensors of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

KL_KINDS: Final = ("k1", "abs", "k2", "k3")
RATIO_LEVELS: Final = ("token", "sequence")


# verl's and TRL's name of an estimator -> the name used here.
_KL_NAMES: Final = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


def check_kl_kind(op: str, kind: str) -> None:
    if kind not in KL_KINDS:
        raise ValueError(f"{op}: KL kind must be one of {', '.join(KL_KINDS)}, came {kind!r}")


def kl_kind_of(op: str, name: str) -> str:
    """The KL kind that a name stands for: one of KL_KINDS, or verl's and TRL's name of it."""
    kind = _KL_NAMES.get(name, name)
    check_kl_kind(op, kind)
    return kind


def check_positive(op: str, name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{op}: {name} must be > 0, came {value}")


def check_clip(op: str, clip_low: float, clip_high: float, dual_clip: float | None = None) -> None:
    """Check the bounds of a ratio."""
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not value >= 0:
            raise ValueError(f"{op}: {name} must be >= 0, came {value}")
    if dual_clip is not None and not dual_clip > 1 + clip_high:
        raise ValueError(
            f"{op}: dual_clip must be > 1 + clip_high = {1 + clip_high}, came {dual_clip}"
        )


@dataclass(frozen=True)
class PolicyLossConfig:
    """Settings of a policy loss and its regularisers; the defaults are PPO's own.

    Args:
        clip_low: the ratio is clipped below at 1 - clip_low; >= 0.
        clip_high: the ratio is clipped above at 1 + clip_high; >= 0 (DAPO's clip-higher if it is
            larger than clip_low).
        dual_clip: c: where A < 0 the loss is at most c |A|; > 1 + clip_high, or None for no bound.
        kl_coef: weight beta of the KL to the reference in the loss (not in the reward).
        kl_kind: estimator of that KL: "k1", "abs", "k2" or "k3"; or verl's names of
            them, kl, abs, mse and low_var_kl.
        entropy_coef: weight of the entropy bonus.
        ratio_level: "token", or "sequence" for GSPO: one ratio, exp(mean log ratio), per sequence.
        log_ratio_limit: log ratios are clamped to +-this before exp; > 0.
        tau_pos, tau_neg: > 0, of `linear_policy_loss(loss="sapo")`.
        ratio_limit: > 0, of `linear_policy_loss(loss="dppo_tv" or "dppo_kl")`.
        kl_bias_correction: whether the KL is multiplied by the loss's ratio, which is
            differentiated too (TRL's use_bias_correction_kl).
        kl_limit: the KL of a token is clamped to +-this, beyond which it has no gradient; > 0, or
            None for no limit (verl's k3 has 10).

    Raises:
        ValueError: a setting is out of range.

    Source: Schulman et al. 2017 (clip); Ye et al. 2020, arXiv 1912.09729 (dual clip); Schulman
    2020, Approximating KL Divergence (k1, k2, k3); Zheng et al. 2025, arXiv 2507.18071 (sequence
    ratio).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    entropy_coef: float = 0.0
    ratio_level: str = "token"
    log_ratio_limit: float = 20.0
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    ratio_limit: float = 20.0
    kl_bias_correction: bool = False
    kl_limit: float | None = None

    def __post_init__(self) -> None:
        op = "PolicyLossConfig"
        check_clip(op, self.clip_low, self.clip_high, self.dual_clip)
        object.__setattr__(self, "kl_kind", kl_kind_of(op, self.kl_kind))
        if self.ratio_level not in RATIO_LEVELS:
            raise ValueError(
                f"{op}: ratio_level must be one of {', '.join(RATIO_LEVELS)}, "
                f"came {self.ratio_level!r}"
            )
        for name in ("log_ratio_limit", "tau_pos", "tau_neg", "ratio_limit"):
            check_positive(op, name, getattr(self, name))
        if self.kl_limit is not None:
            check_positive(op, "kl_limit", self.kl_limit)


@dataclass(frozen=True)
class HeadLora:
    """A low-rank addition to the head: logits += scaling * (h A^T) B^T, in PEFT's layout.

    Args:
        A_RD: float (R, D), `lora_A.weight`.
        B_VR: float (V, R), `lora_B.weight`.
        scaling: lora_alpha / R, or lora_alpha / sqrt(R) for rank-stabilised LoRA.
    """

    A_RD: Tensor
    B_VR: Tensor
    scaling: float = 1.0
