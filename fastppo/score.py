"""Rollout -> Scored: what actor, reference, critic and reward say of it, forward only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.batch import Batch, batches
from fastppo.ops import linear_token_logprobs
from fastppo.reward import Reward
from fastppo.types import Rollout, Scored

if TYPE_CHECKING:
    from fastppo.ops import TokenLogprobs
    from fastppo.roles import Roles


def token_scores(
    roles: Roles, hidden_BTD: Tensor, batch: Batch, temperature: float
) -> TokenLogprobs:
    """Log-prob and entropy of the batch's response tokens, with the head on those tokens only."""
    weight_VD, bias_V, softcap = roles.lm_head
    hidden_ND = batch.packing.gather(hidden_BTD)
    return linear_token_logprobs(
        hidden_ND.to(weight_VD.dtype),
        weight_VD,
        batch.token_N,
        bias_V=bias_V,
        softcap=softcap,
        temperature=temperature,
    )


@torch.no_grad()
def score(
    roles: Roles, rollout: Rollout, reward: Reward, *, temperature: float, batch_size: int
) -> Scored:
    """Score every response; the same rows in the same micro-batches as the update will run them."""
    roles.model.eval()
    logprobs, refs, entropies, values, finals = [], [], [], [], []
    for batch in batches(rollout, range(len(rollout.prompts)), batch_size):
        with roles.use("actor"):
            actor_BTD = roles.hidden(batch.input_ids_BT, batch.mask_BT)
            actor = token_scores(roles, actor_BTD, batch, temperature)
        with roles.use("reference"):
            ref_BTD = roles.hidden(batch.input_ids_BT, batch.mask_BT)
            ref = token_scores(roles, ref_BTD, batch, temperature)
        if roles.shares_trunk:
            critic_BTD = actor_BTD
        else:
            with roles.use("critic"):
                critic_BTD = roles.hidden(batch.input_ids_BT, batch.mask_BT)
        logprobs.append(actor.logprob_N)
        entropies.append(actor.entropy_N)
        refs.append(ref.logprob_N)
        values.append(roles.value(batch.packing.gather(critic_BTD)))
        rows = torch.arange(len(batch.rows), device=critic_BTD.device)
        finals.append(roles.value(critic_BTD[rows, batch.last_B]))
    score_B, reward_parts = reward(rollout)
    starts = torch.tensor([0, *rollout.response_lengths]).cumsum(0)
    return Scored(
        rollout=rollout,
        offsets=starts.to(torch.int32).to(rollout.input_ids_BT.device),
        logprob_N=torch.cat(logprobs),
        ref_logprob_N=torch.cat(refs),
        entropy_N=torch.cat(entropies),
        value_N=torch.cat(values),
        final_value_B=torch.cat(finals),
        score_B=score_B,
        reward_parts=reward_parts,
    )
