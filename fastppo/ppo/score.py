"""Rollout -> Scored: what actor, reference, critic and reward say of it, forward only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.errors import UserError
from fastppo.models.batch import Batch, Budget, Order, batches
from fastppo.ops import linear_score_tokens, linear_token_logprobs
from fastppo.types import Kept, Rollout, Scored

if TYPE_CHECKING:
    from fastppo.models.build import Roles
    from fastppo.ops import Scores, TokenLogprobs


def token_scores(
    roles: Roles,
    hidden_BTD: Tensor,
    batch: Batch,
    temperature: float,
    chunk_bytes: int | None = None,
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
        chunk_bytes=chunk_bytes,
    )


def exact_scores(
    roles: Roles,
    actor_BTD: Tensor,
    ref_BTD: Tensor,
    batch: Batch,
    temperature: float,
    chunk_bytes: int | None = None,
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
        chunk_bytes=chunk_bytes,
    )


@torch.no_grad()
def score(
    roles: Roles,
    rollout: Rollout,
    reward: Callable[[Rollout], tuple[Tensor, dict[str, Tensor]]],
    *,
    temperature: float,
    budget: Budget,
    exact_kl: bool = False,
    keep: bool = False,
    chunk_bytes: int | None = None,
) -> Scored:
    """Score every response, forward only, in micro-batches of rows of similar length.

    With `keep`, and all rows in one micro-batch, the actor's forward is run as the update runs it
    and its graph kept: the first optimiser pass, with the same weights, starts behind it. It is the
    last forward of all, so that nothing but the advantages is computed while the graph waits.
    """
    roles.eval()
    score_B, reward_parts = reward(rollout)
    made = batches(rollout, range(len(rollout.prompts)), budget)
    kept = None
    logprobs, refs, entropies, kls, values, finals = [], [], [], [], [], []
    for batch in made:
        with roles.use("reference"):
            ref_BTD = roles.hidden(**batch.inputs)
            if not exact_kl:
                scores = token_scores(roles, ref_BTD, batch, temperature, chunk_bytes)
                refs.append(scores.logprob_N)
                del ref_BTD
        if roles.has_critic and not roles.shares_trunk:
            with roles.use("critic"):
                critic_BTD = roles.hidden(**batch.inputs)
            values.append(roles.value(batch.packing.gather(critic_BTD)))
            finals.append(roles.value(batch.last(critic_BTD)))
            del critic_BTD
        with roles.use("actor"):
            if keep and len(made) == 1:
                hidden_BTD = keep_forward(roles, batch)
                kept, actor_BTD = Kept(batch.rows, hidden_BTD), hidden_BTD.detach()
            else:
                actor_BTD = roles.hidden(**batch.inputs)
            if not exact_kl:
                actor = token_scores(roles, actor_BTD, batch, temperature, chunk_bytes)
        if exact_kl:
            actor = exact_scores(roles, actor_BTD, ref_BTD, batch, temperature, chunk_bytes)
            refs.append(actor.ref_logprob_N)
            kls.append(actor.exact_kl_N)
        logprobs.append(actor.logprob_N)
        entropies.append(actor.entropy_N)
        if roles.has_critic and roles.shares_trunk:
            values.append(roles.value(batch.packing.gather(actor_BTD)))
            finals.append(roles.value(batch.last(actor_BTD)))
    order = Order.of(rollout, made)
    starts = torch.tensor([0, *rollout.response_lengths]).cumsum(0)
    return Scored(
        rollout=rollout,
        offsets=starts.to(torch.int32).to(rollout.input_ids_BT.device),
        logprob_N=order.tokens(logprobs),
        ref_logprob_N=order.tokens(refs),
        entropy_N=order.tokens(entropies),
        score_B=score_B,
        value_N=order.tokens(values) if values else None,
        final_value_B=order.rows(finals) if finals else None,
        exact_kl_N=order.tokens(kls) if kls else None,
        reward_parts=reward_parts,
        kept=kept,
    )


def keep_forward(roles: Roles, batch: Batch) -> Tensor:
    """The active role's forward with its graph, in the mode in which the update runs it."""
    roles.train()
    with torch.enable_grad():
        hidden_BTD = roles.hidden(**batch.inputs)
    roles.eval()
    return hidden_BTD
