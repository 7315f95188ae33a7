"""OpenRLHF's PolicyLoss, ValueLoss and `log_probs_from_logits`, computed by our operators.

    from fastppo.integrations import openrlhf
    openrlhf.install()

`install` has to run in each process that trains; ray does so with
`ray.init(runtime_env={"worker_process_setup_hook": "fastppo.integrations.openrlhf.install"})`.
OpenRLHF's sums over tokens (its `aggregate_loss`) stay, and so do its arguments and results.
"""

from __future__ import annotations

from typing import Any

import torch
from openrlhf.models import loss as theirs
from openrlhf.models import utils
from torch import Tensor

from fastppo.integrations.patching import check_version, replace
from fastppo.ops import losses, token_logprobs

check_version("openrlhf")


class PolicyLoss(theirs.PolicyLoss):  # type: ignore[misc]
    """OpenRLHF's PolicyLoss: PPO's clip or GSPO, with weights against the sampler's log-probs.

    Raises:
        ValueError: a correction that is not weighted by token (`is_correction_level: seq`,
            `is_correction_gating: binary_kl` and `tv`), or one with GSPO: OpenRLHF's own class
            has those.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        came = (self.policy_loss_type, self.is_correction_level, self.is_correction_gating)
        if self.is_correction_level != "off" and came != ("ppo", "token", "ratio"):
            raise ValueError(
                "fastppo.integrations.openrlhf: a correction is taken with policy_loss_type ppo, "
                "is_correction_level token and is_correction_gating ratio; came "
                f"{', '.join(came)}; do not install PolicyLoss for it: "
                "install('ValueLoss', 'log_probs_from_logits')"
            )

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        *counts: Any,
        **named: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Loss, clipped fraction, KL to the old policy, and the correction's KL and fraction.

        The counts, by position or by name, are the last of OpenRLHF's `aggregate_loss`.
        """
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        surrogate = losses.gspo if self.policy_loss_type == "gspo" else losses.ppo_clip
        low, high, dual = self.clip_eps_low, self.clip_eps_high, self.dual_clip
        found = surrogate(
            log_probs, old_log_probs, advantages, mask, clip_low=low, clip_high=high, dual_clip=dual
        )
        loss, sampler_kl, filtered = found.loss, None, None
        if self.is_correction_level != "off":
            assert rollout_log_probs is not None
            low, high = self.is_correction_threshold
            mode = {"clip": "token_truncate", "mask": "token_mask"}[self.is_correction_mode]
            loss = loss * losses.importance_weights(
                old_log_probs, rollout_log_probs, mask, mode=mode, lower=low, upper=high
            )
            ratio = (old_log_probs - rollout_log_probs).exp()
            filtered = mean((ratio < low) | (ratio > high), mask)
            sampler_kl = mean(rollout_log_probs - old_log_probs, mask)
        total = theirs.aggregate_loss(loss, mask, self.token_level_loss, *counts, **named)
        clipped = mean(found.clipped_low | found.clipped_high, mask)
        return total, clipped, mean(old_log_probs - log_probs, mask), sampler_kl, filtered


class ValueLoss(theirs.ValueLoss):  # type: ignore[misc]
    """OpenRLHF's ValueLoss: half the squared error, clipped around the old values by `clip_eps`."""

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        *counts: Any,
        **named: Any,
    ) -> Tensor:
        mask = torch.ones_like(values) if action_mask is None else action_mask
        found = losses.value_loss(values, old_values, returns, mask, clip=self.clip_eps)
        return theirs.aggregate_loss(found.loss, mask, self.token_level_loss, *counts, **named)  # type: ignore[no-any-return]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs (B, T) of the labels, float32; unlike OpenRLHF's, the logits are not divided."""
    return token_logprobs(logits, labels, temperature=temperature).logprob_N


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over live tokens, without gradient."""
    return losses.aggregate(x.detach().float(), mask)


THEIRS = {
    "PolicyLoss": theirs.PolicyLoss,
    "ValueLoss": theirs.ValueLoss,
    "log_probs_from_logits": utils.log_probs_from_logits,
}


def install(*names: str) -> None:
    """Put ours in the place of OpenRLHF's, in every module of it that has imported them.

    Args:
        names: of "PolicyLoss", "ValueLoss" and "log_probs_from_logits"; none is all three.

    Raises:
        ValueError: a name that is none of these.
    """
    unknown = set(names) - set(THEIRS)
    if unknown:
        raise ValueError(f"install: one of {', '.join(THEIRS)}, came {', '.join(sorted(unknown))}")
    for name in names or THEIRS:
        replace("openrlhf", name, THEIRS[name], globals()[name])
