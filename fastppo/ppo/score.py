"""Rollout -> Scored: rewards, log-probs of actor and reference, and values of the critic."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import set_seed

from fastppo.errors import UserError
from fastppo.memory.budgets import Budget, Budgets
from fastppo.models.batch import Batch, Order, batches, padded_tokens
from fastppo.ops import linear_score_tokens, linear_token_logprobs
from fastppo.ppo.rollout import pad_right
from fastppo.seeds import seed_of
from fastppo.types import Kept, Rollout, Scored

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.models.build import Roles
    from fastppo.ops import Scores, TokenLogprobs
    from fastppo.ppo.state import State
    from fastppo.run.world import World
    from fastppo.types import Prompt


def token_scores(
    roles: Roles,
    hidden_BTD: Tensor,
    batch: Batch,
    temperature: float,
    chunk_bytes: int | None = None,
) -> TokenLogprobs:
    """Log-probs and entropies of the response tokens; the output head runs on no other tokens."""
    head = roles.lm_head
    hidden_ND = batch.packing.gather(hidden_BTD)
    return linear_token_logprobs(
        hidden_ND.to(head.weight_VD.dtype),
        head.weight_VD,
        batch.token_N,
        bias_V=head.bias_V,
        softcap=head.softcap,
        temperature=temperature,
        logit_scale=head.scale,
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
    alike = (head.softcap, head.scale) == (ref_head.softcap, ref_head.scale)
    if not alike or ref_head.bias_V is not head.bias_V:
        raise UserError(
            "kl_penalty: full: the reference has an output bias, scale or softcap of its own; use "
            "kl"
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
        logit_scale=head.scale,
        chunk_bytes=chunk_bytes,
    )


Rewards = tuple[Tensor, dict[str, Tensor]]  # as `Reward` returns them


def rewards_of(state: State, rollout: Rollout, purpose: str, first: int) -> Rewards:
    """Rewards of rows `first` and following.

    Of several processes each seeds the global generators first, which reward functions may draw
    from: a checkpoint has the state of those of one process.
    """
    if state.world.size > 1:
        set_seed(seed_of(state.config.seed, f"rewards/{purpose}", state.step, first) % 2**32)
    return state.reward(rollout)


def step_rewards(state: State, rollout: Rollout, first: int) -> Rewards:
    """Rewards of a step's rows `first` and following; their first response is kept to be shown."""
    score_B, parts = rewards_of(state, rollout, "step", first)
    state.sample = (rollout.prompts[0].text, rollout.texts[0], score_B[0].item())
    return score_B, parts


@torch.no_grad()
def score(
    roles: Roles,
    rollout: Rollout,
    rewards: Rewards,
    *,
    temperature: float,
    budget: Budget,
    exact_kl: bool = False,
    keep: int = 0,
    chunk_bytes: int | None = None,
) -> Scored:
    """Log-probs, reference log-probs, entropies and values of every response token, forward only.

    Args:
        rewards: the score (B,) and the scores of each reward; both are copied into the result.
        budget: limits of a micro-batch, read at each call; rows of similar length share one.
        exact_kl: also compute the KL over the whole vocabulary (`kl_penalty: full`).
        keep: largest number of tokens, padding included, whose forwards may be kept with their
            graphs for the first optimiser step, which has the same weights; they run in the
            update's training mode. Kept are the actor's, and if there is room a separate critic's.
    """
    roles.eval()
    score_B, reward_parts = rewards
    made = batches(rollout, range(len(rollout.prompts)), budget)
    sharding = roles.sharding
    kept = Kept() if keep and sharding is None else None
    tokens = sum(padded_tokens(rollout, batch.rows, budget) for batch in made)

    def hidden(role: str, batch: Batch, room: int) -> Tensor:
        """Hidden states of the active role; with their graph in `kept` too, if there is room."""
        if kept is None or room < tokens:
            return roles.hidden(**batch.inputs)
        hidden_BTD = kept.hidden[role, tuple(batch.rows)] = keep_forward(roles, batch)
        return hidden_BTD.detach()

    missing = 0 if sharding is None else sharding.missing(len(made))
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
                critic_BTD = hidden("critic", batch, keep // 2)  # beside the actor's
            values.append(roles.value(batch.packing.gather(critic_BTD)))
            finals.append(roles.value(batch.last(critic_BTD)))
            del critic_BTD
        with roles.use("actor"):
            actor_BTD = hidden("actor", batch, keep)
            if not exact_kl:
                actor = token_scores(roles, actor_BTD, batch, temperature, chunk_bytes)
                logprobs.append(actor.logprob_N)
                entropies.append(actor.entropy_N)
        if exact_kl:
            both = exact_scores(roles, actor_BTD, ref_BTD, batch, temperature, chunk_bytes)
            logprobs.append(both.logprob_N)
            entropies.append(both.entropy_N)
            refs.append(both.ref_logprob_N)
            kls.append(both.exact_kl_N)
        if roles.has_critic and roles.shares_trunk:
            values.append(roles.value(batch.packing.gather(actor_BTD)))
            finals.append(roles.value(batch.last(actor_BTD)))
    if sharding is not None:
        sharding.idle_scoring(missing)
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
        kept=kept if kept is not None and kept.hidden else None,
    )


def first_pass_tokens(config: Config, budgets: Budgets, rows: int) -> int:
    """Largest number of tokens whose forwards may be kept for the update; 0 is none.

    The update can use them in its first pass if both run the same micro-batches: an epoch is one
    optimiser step of all rows, and scoring and update have the same budget. There are no more
    tokens than the update's largest micro-batch may have, so that the memory plan covers them.

    Args:
        rows: number of sequences of the rollout.
    """
    whole = config.ppo_buffer_size == 1 and not config.mask_truncated_completions
    if not whole or budgets.update != budgets.scoring:
        return 0
    rows = min(rows, budgets.update.rows or rows)
    tokens = rows * (config.cutoff_len + config.max_new_tokens)
    return min(tokens, budgets.update.tokens or tokens)


def keep_forward(roles: Roles, batch: Batch) -> Tensor:
    """Hidden states of the active role with their graph, in the update's training mode."""
    roles.train()
    with torch.enable_grad():
        hidden_BTD = roles.hidden(**batch.inputs)
    roles.eval()
    return hidden_BTD


# What `gather_scored` sends of each process: fields with an entry a row or a token.
OF_ROLLOUT = ("prompt_lengths", "response_lengths", "terminated", "texts")
OF_SCORED = (
    "logprob_N",
    "ref_logprob_N",
    "entropy_N",
    "score_B",
    "value_N",
    "final_value_B",
    "exact_kl_N",
)


def gather_scored(
    scored: Scored, prompts: list[Prompt], first: int, pad_id: int, world: World
) -> Scored:
    """The scored rollout of the whole step, in every process; alone it is `scored` itself.

    Every process then computes the same rewards, advantages and metrics from all tokens of the
    step. These are a few numbers a token: only forwards and backwards are worth sharing out.

    Args:
        scored: this process's rows.
        prompts: of all rows.
        first: the number of this process's first row.
        pad_id: fills the input ids up.
    """
    if world.size == 1:
        return scored
    rollout, device = scored.rollout, scored.score_B.device
    lengths, ids = rollout.lengths, rollout.input_ids_BT.tolist()
    lists = {name: getattr(rollout, name) for name in OF_ROLLOUT}
    lists["ids"] = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    tensors = {name: getattr(scored, name) for name in OF_SCORED}
    tensors["sampler_logprob_N"] = rollout.sampler_logprob_N
    lists, tensors, parts = join(world, lists, tensors, scored.reward_parts)
    rows, states, kept = lists.pop("ids"), rollout.states, scored.kept
    starts = torch.tensor([0, *lists["response_lengths"]]).cumsum(0)
    return replace(
        scored,
        rollout=Rollout(
            prompts=prompts,
            input_ids_BT=pad_right(rows, pad_id, device),
            sampler_logprob_N=tensors.pop("sampler_logprob_N"),
            states=None if states is None else states.among(len(rows), first),
            **lists,
        ),
        offsets=starts.to(torch.int32).to(device),
        reward_parts=parts,
        kept=None if kept is None else kept.among(first),
        own=range(first, first + len(lengths)),
        **tensors,
    )


def join(world: World, lists: dict[str, list[Any]], *groups: dict[str, Any]) -> tuple[Any, ...]:
    """Lists, and groups of tensors (or None) by name, each as all processes' in one, by rank."""
    tensors = [{k: x for k, x in each.items() if x is not None} for each in groups]
    on_host = [{k: x.cpu() for k, x in each.items()} for each in tensors]
    found = world.gather((lists, on_host))
    joined = {name: [x for theirs, _ in found for x in theirs[name]] for name in lists}
    cats = [
        {k: torch.cat([theirs[i][k] for _, theirs in found]).to(x.device) for k, x in each.items()}
        for i, each in enumerate(tensors)
    ]
    return joined, *cats
