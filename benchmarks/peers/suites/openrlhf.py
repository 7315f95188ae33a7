"""OpenRLHF: its tests of the losses' aggregation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.stubs import stub
from benchmarks.peers.suites import Suite, ours
from fastppo.ops import losses


@ours
def aggregate_loss(
    loss: Tensor,
    loss_mask: Tensor,
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
) -> Tensor:
    """A loss of tokens, aggregated; dp_size undoes the mean over ranks."""
    mode = "token-mean" if token_level_loss else "seq-mean-token-mean"
    denominator = batch_num_tokens if token_level_loss else global_batch_size
    return dp_size * losses.aggregate(loss, loss_mask, mode, denominator)


class PolicyLoss:
    """PPO's clipped loss, optionally with truncated importance weights, and its metrics."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        enable_vllm_is_correction: bool = False,
        vllm_is_truncated_threshold: Any = None,
        vllm_is_correction_type: str = "tis",
    ) -> None:
        self.clip = {"clip_low": clip_eps_low, "clip_high": clip_eps_high}
        self.bounds = vllm_is_truncated_threshold if enable_vllm_is_correction else None

    @ours
    def __call__(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor,
        rollout_log_probs: Tensor | None = None,
        **aggregation: Any,
    ) -> tuple[Tensor | None, ...]:
        found = losses.ppo_clip(log_probs, old_log_probs, advantages, action_mask, **self.clip)
        loss, sampler_kl = found.loss, None

        def kl(x: Tensor, y: Tensor) -> Tensor:
            return losses.aggregate(losses.kl(x, y, action_mask, kind="k1"), action_mask)

        if self.bounds is not None and rollout_log_probs is not None:
            low, high = self.bounds
            loss = loss * losses.importance_weights(
                old_log_probs, rollout_log_probs, action_mask, lower=low, upper=high
            )
            sampler_kl = kl(rollout_log_probs, old_log_probs)
        clipped = (found.clipped_low | found.clipped_high).to(torch.float32)
        return (
            aggregate_loss(loss, action_mask, **aggregation),
            losses.aggregate(clipped, action_mask),
            kl(old_log_probs, log_probs),
            sampler_kl,
        )


def prepare(_: Path) -> None:
    """Their loss's module imports deepspeed for a function that it does not call."""
    stub("deepspeed")


SUITE = Suite(
    prepare=prepare,
    folder="OpenRLHF",
    files=("tests/test_loss_aggregation.py",),
    replaced={"PolicyLoss": PolicyLoss, "aggregate_loss": aggregate_loss},
)
