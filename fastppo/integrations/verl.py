"""verl with our output head and our policy losses, in every worker process.

    VERL_USE_EXTERNAL_MODULES=fastppo.integrations.verl python -m verl.trainer.main_ppo ...
        actor_rollout_ref.model.use_fused_kernels=true
        actor_rollout_ref.model.fused_kernel_options.impl_backend=torch
        actor_rollout_ref.actor.policy_loss.loss_mode=fastppo_ppo_clip

The head is verl's FusedLinearForPPO under `impl_backend: torch`. The losses are those of
`fastppo.ops.losses.POLICY_LOSSES`, with `fastppo_` before the name. Both read verl's own settings,
and verl's `agg_loss` does the sums over tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.utils.experimental import torch_functional

from fastppo.integrations.head import logprobs_and_entropy
from fastppo.integrations.patching import check_version
from fastppo.ops import losses

check_version("verl")

THEIRS = torch_functional.FusedLinearForPPO.forward
PREFIX = "fastppo_"
# What each loss reads of verl's ActorConfig: our argument -> their field.
CLIP = {"clip_low": "clip_ratio_low", "clip_high": "clip_ratio_high"}
SETTINGS: dict[str, dict[str, str]] = {
    "ppo_clip": {**CLIP, "dual_clip": "clip_ratio_c"},
    "dr_grpo": {**CLIP, "dual_clip": "clip_ratio_c"},
    "gspo": CLIP,
    "gspo_token": CLIP,
    "cispo": CLIP,
    "sapo": {"tau_pos": "tau_pos", "tau_neg": "tau_neg"},
    "dppo_tv": {**CLIP, "ratio_limit": "clip_ratio_c"},
    "dppo_kl": {**CLIP, "ratio_limit": "clip_ratio_c"},
    "reinforce": {},
}


def fused_head(
    self: Any,
    hidden_states: Tensor,
    vocab_weights: Tensor,
    input_ids: Tensor,
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """FusedLinearForPPO.forward: log-probs and entropies of tokens from hidden states."""
    if self.impl_backend != "torch":
        return THEIRS(self, hidden_states, vocab_weights, input_ids, temperature)  # type: ignore[no-any-return]
    return logprobs_and_entropy(
        hidden_states, vocab_weights, input_ids.to(torch.int64), temperature=temperature
    )


def setting(config: Any, field: str) -> float | None:
    """A field of verl's ActorConfig; a clip that is not set is `clip_ratio`, as in verl."""
    value: float | None = config.get(field, None)
    if value is None and field in CLIP.values():
        value = config.clip_ratio
    return value


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    name: str,
) -> tuple[Tensor, dict[str, Any]]:
    """One of our losses with the arguments and the results of verl's.

    Args:
        old_log_prob, log_prob, advantages, response_mask: (B, T).
        loss_agg_mode: verl's name of an aggregation.
        config: verl's ActorConfig.
        rollout_is_weights: (B, T) importance weights of the tokens, or None.
        name: a key of `fastppo.ops.losses.POLICY_LOSSES`.

    Returns:
        The loss, a scalar, and verl's metrics of it.
    """
    settings = {ours: setting(config, field) for ours, field in SETTINGS[name].items()}
    found = losses.POLICY_LOSSES[name](
        log_prob, old_log_prob, advantages, response_mask, **settings
    )
    loss = found.loss if rollout_is_weights is None else found.loss * rollout_is_weights
    total = core_algos.agg_loss(
        loss_mat=loss,
        loss_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        **config.global_batch_info,
    )

    def mean(x: Tensor) -> float:
        return losses.aggregate(x.detach().float(), response_mask).item()

    return total, {
        "actor/pg_clipfrac": mean(found.clipped_low | found.clipped_high),
        "actor/ppo_kl": mean(old_log_prob - log_prob),
        "actor/pg_clipfrac_lower": mean(found.dual_clipped),
    }


torch_functional.FusedLinearForPPO.forward = fused_head
for name in SETTINGS:
    core_algos.register_policy_loss(PREFIX + name)(partial(policy_loss, name=name))
