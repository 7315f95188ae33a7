r"""Losses of a language model's policy as functions of log-probs: plain PyTorch, for any trainer.

A batch comes in one of two forms, and results have the same form:

    padded    log-probs (B, T) and a mask (B, T), which may have holes
    packed    log-probs (N,) of the live tokens, and offsets (B+1,) where a loss needs sequences

Losses are given token by token and never reduced: `weights` and `aggregate` do that, for surrogate,
KL and entropy apart. A token outside the mask has loss 0 and no gradient, whatever stands there.

    found = ppo_clip(logprob_BT, old_logprob_BT, advantage_BT, mask_BT, clip_high=0.28)
    kl_BT = kl(logprob_BT, ref_logprob_BT, mask_BT, kind="k3")
    loss = aggregate(found.loss + 0.01 * kl_BT, mask_BT, "token-mean")

`linear_policy_loss(..., loss=NAME)` takes the names of POLICY_LOSSES straight from
hidden states; dro, geo_mean and vespo are functions of log-probs only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

from fastppo.ops.losses.aggregation import AGGREGATIONS, aggregate, weights
from fastppo.ops.losses.clipped import dr_grpo, gspo, gspo_token, ppo_clip
from fastppo.ops.losses.groups import GROUP_ADVANTAGES, group_advantages
from fastppo.ops.losses.importance import IMPORTANCE_MODES, importance_weights
from fastppo.ops.losses.kl import kl
from fastppo.ops.losses.sequences import geo_mean, vespo
from fastppo.ops.losses.tokens import TokenLoss
from fastppo.ops.losses.value import TokenValueLoss, value_loss
from fastppo.ops.losses.weighted import cispo, dppo, dro, reinforce, sapo

POLICY_LOSSES: Final[dict[str, Callable[..., TokenLoss]]] = {
    "ppo_clip": ppo_clip,
    "dr_grpo": dr_grpo,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
    "sapo": sapo,
    "dppo_tv": functools.partial(dppo, divergence="tv"),
    "dppo_kl": functools.partial(dppo, divergence="kl"),
    "reinforce": reinforce,
}
SEQUENCE_LOSSES: Final = ("gspo", "gspo_token")  # whose tokens depend on their whole sequence

__all__ = [
    "AGGREGATIONS",
    "GROUP_ADVANTAGES",
    "IMPORTANCE_MODES",
    "POLICY_LOSSES",
    "SEQUENCE_LOSSES",
    "TokenLoss",
    "TokenValueLoss",
    "aggregate",
    "cispo",
    "dppo",
    "dr_grpo",
    "dro",
    "geo_mean",
    "group_advantages",
    "gspo",
    "gspo_token",
    "importance_weights",
    "kl",
    "ppo_clip",
    "reinforce",
    "sapo",
    "value_loss",
    "vespo",
    "weights",
]
