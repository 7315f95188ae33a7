"""verl with our output head and our policy losses, in every worker process.

    VERL_USE_EXTERNAL_MODULES=fastppo.integrations.verl python -m verl.trainer.main_ppo ...
        actor_rollout_ref.model.use_fused_kernels=true
        actor_rollout_ref.model.fused_kernel_options.impl_backend=torch
        actor_rollout_ref.actor.policy_loss.loss_mode=fastppo_ppo_clip

The head is verl's FusedLinearForPPO under `impl_backend: torch`, and in its Megatron engine, whose
ranks share the vocabulary out (tensor parallel), its `linear_cross_entropy`. The losses are those
of `fastppo.ops.losses.POLICY_LOSSES`, with `fastppo_` before the name. All read verl's own
settings, and verl's `agg_loss` does the sums over tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.utils.experimental import torch_functional
from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

from fastppo.integrations.head import logprobs_and_entropy
from fastppo.integrations.patching import check_version, replace
from fastppo.ops import losses

check_version("verl")

THEIRS = torch_functional.FusedLinearForPPO.forward
THEIR_CROSS_ENTROPY = linear_cross_entropy
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


def sharded_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """verl's linear_cross_entropy as its Megatron engine calls it: a rank has some of the words.

    Hidden states (..., D) are the same on every rank, the weight (V / ranks, D) is this rank's, and
    labels (...) are ids of the whole vocabulary; log-probs and entropies in nats come back as (N,).
    The hidden states were gathered from parts of a sequence, and their own backward adds up the
    ranks' gradients: those are not reduced here, as they are not in verl.
    """
    if dist_process_group is None or reduction != "none":
        given = (hidden, weight, labels, temperature, reduction, dist_process_group)
        return THEIR_CROSS_ENTROPY(*given)  # type: ignore[no-any-return]
    return logprobs_and_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1).to(torch.int64),
        temperature=temperature,
        group=dist_process_group,
        reduce_hidden_grad=False,
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
    """`fastppo.ops.losses.POLICY_LOSSES[name]` as verl's losses are called: loss and metrics.

    All tensors are (B, T); config is verl's ActorConfig.
    """
    settings = {ours: setting(config, field) for ours, field in SETTINGS[name].items()}
    given = (log_prob, old_log_prob, advantages, response_mask)
    found = losses.POLICY_LOSSES[name](*given, **settings)
    loss = found.loss if rollout_is_weights is None else found.loss * rollout_is_weights
    total = core_algos.agg_loss(loss, response_mask, loss_agg_mode, **config.global_batch_info)

    def mean(x: Tensor) -> float:
        return losses.aggregate(x.detach().float(), response_mask).item()

    return total, {
        "actor/pg_clipfrac": mean(found.clipped_low | found.clipped_high),
        "actor/ppo_kl": mean(old_log_prob - log_prob),
        "actor/pg_clipfrac_lower": mean(found.dual_clipped),
    }


torch_functional.FusedLinearForPPO.forward = fused_head
replace("verl", "linear_cross_entropy", THEIR_CROSS_ENTROPY, sharded_head)
for name in SETTINGS:
    core_algos.register_policy_loss(PREFIX + name)(partial(policy_loss, name=name))
