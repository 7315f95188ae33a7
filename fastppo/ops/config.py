"""Settings of a policy loss and an output head, besides the tensors of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

KL_KINDS: Final = ("k1", "abs", "k2", "k3")
RATIO_LEVELS: Final = ("token", "sequence")


def check_kl_kind(op: str, kind: str) -> None:
    if kind not in KL_KINDS:
        raise ValueError(f"{op}: KL kind must be one of {', '.join(KL_KINDS)}, came {kind!r}")


@dataclass(frozen=True)
class PolicyLossConfig:
    """The clipped surrogate of PPO and its regularisers; the defaults are PPO's own.

    Args:
        clip_low: the ratio is clipped below at 1 - clip_low; >= 0.
        clip_high: the ratio is clipped above at 1 + clip_high; >= 0 (DAPO's clip-higher if it is
            larger than clip_low).
        dual_clip: c: where A < 0 the loss is at most c |A|; > 1 + clip_high, or None for no bound.
        kl_coef: weight beta of the KL to the reference in the loss (not in the reward).
        kl_kind: estimator of that KL: "k1", "abs", "k2" or "k3".
        entropy_coef: weight of the entropy bonus.
        ratio_level: "token", or "sequence" for GSPO: one ratio, exp(mean log ratio), per sequence.
        log_ratio_limit: log ratios are clamped to +-this before exp; > 0.

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

    def __post_init__(self) -> None:
        op = "PolicyLossConfig"
        for name in ("clip_low", "clip_high"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{op}: {name} must be >= 0, came {getattr(self, name)}")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise ValueError(
                f"{op}: dual_clip must be > 1 + clip_high = {1 + self.clip_high}, "
                f"came {self.dual_clip}"
            )
        check_kl_kind(op, self.kl_kind)
        if self.ratio_level not in RATIO_LEVELS:
            raise ValueError(
                f"{op}: ratio_level must be one of {', '.join(RATIO_LEVELS)}, "
                f"came {self.ratio_level!r}"
            )
        if not self.log_ratio_limit > 0:
            raise ValueError(f"{op}: log_ratio_limit must be > 0, came {self.log_ratio_limit}")


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
