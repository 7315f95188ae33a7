"""Rollout -> Scored: what actor, reference, critic and reward say of it, forward only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.batch import Batch, batches
from fastppo.errors import UserError
from fastppo.ops import linear_score_tokens, linear_token_logprobs
from fastppo.reward import Reward
from fastppo.types import Rollout, Scored

if TYPE_CHECKING:
    from fastppo.ops import Scores, TokenLogprobs
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


def exact_scores(
    roles: Roles, actor_BTD: Tensor, ref_BTD: Tensor, batch: Batch, temperature: float
) -> Scores:
    """Both policies' log-probs, and their KL over the whole vocabulary (kl_penalty: full)."""
    with roles.use("actor"):
        head = roles.lm_head
    with roles.use("reference"):
        ref_head = roles.lm_head
    if ref_head.softcap != head.softcap or ref_head.bias_V is not head.bias_V:
        raise UserError(
            "kl_penalty: full: the reference has an output bias or softcap of its own; use kl"
        )
    return linear_score_tokens(
        batch.packing.gather(actor_BTD).to(head.weight_VD.dtype),
        batch.packing.gather(ref_BTD).to(ref_head.weight_VD.dtype),
        head.weight_VD,
        batch.token_N,
        ref_weight_VD=ref_head.weight_VD,
        bias_V=head.bias_V,
        softcap=head.softcap,
        temperature=temperature,
    )


@torch.no_grad()
def score(
    roles: Roles,
    rollout: Rollout,
    reward: Reward,
    *,
    temperature: float,
    batch_size: int,
    exact_kl: bool = False,
) -> Scored:
    """Score every response; the same rows in the same micro-batches as the update will run them."""
    roles.eval()
    logprobs, refs, entropies, kls, values, finals = [], [], [], [], [], []
    for batch in batches(rollout, range(len(rollout.prompts)), batch_size):
        with roles.use("actor"):
            actor_BTD = roles.hidden(batch.input_ids_BT, batch.mask_BT)
            if not exact_kl:
                actor = token_scores(roles, actor_BTD, batch, temperature)
        with roles.use("reference"):
            ref_BTD = roles.hidden(batch.input_ids_BT, batch.mask_BT)
            if not exact_kl:
                refs.append(token_scores(roles, ref_BTD, batch, temperature).logprob_N)
        if exact_kl:
            actor = exact_scores(roles, actor_BTD, ref_BTD, batch, temperature)
            refs.append(actor.ref_logprob_N)
            kls.append(actor.exact_kl_N)
        logprobs.append(actor.logprob_N)
        entropies.append(actor.entropy_N)
        if not roles.has_critic:
            continue
        critic_BTD = actor_BTD
        if not roles.shares_trunk:
            with roles.use("critic"):
                critic_BTD = roles.hidden(batch.input_ids_BT, batch.mask_BT)
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
        score_B=score_B,
        value_N=torch.cat(values) if values else None,
        final_value_B=torch.cat(finals) if finals else None,
        exact_kl_N=torch.cat(kls) if kls else None,
        reward_parts=reward_parts,
    )
