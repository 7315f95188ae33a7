"""Prompt -> Rollout: sample responses in batches as large as the memory for the KV cache allows."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from fastppo.memory.units import RESERVE
from fastppo.models.lora import merge_active_adapters, merge_is_exact, merged_weight_bytes
from fastppo.ops.few_rows import MOST_ROWS, runs_native
from fastppo.ppo.cpu_layers import use_cpu_layers
from fastppo.ppo.row_batches import sample_row_batches, split_prompts
from fastppo.ppo.sampler import Sampler, cache_width
from fastppo.ppo.sampling import Answer, Draws, Sampling, Stops
from fastppo.ppo.slots import windows_of
from fastppo.types import Prompt, Rollout

if TYPE_CHECKING:
    from fastppo.memory.budgets import Budgets
    from fastppo.memory.plan import Plan
    from fastppo.models.build import Roles
    from fastppo.ppo.engine import Engine
    from fastppo.ppo.state import State
    from fastppo.templates import Template


def next_prompts(state: State, ahead: int = 0) -> list[Prompt]:
    """The prompts of the next step, each repeated `num_generations` times.

    With `filter_groups` they are those after all that earlier steps have read, and `ahead` is the
    number of batches that the step itself has read. What earlier steps have read follows from the
    rows of metrics, which a checkpoint holds: a resumed run reads on where it stopped.
    """
    refills = sum(int(row.get("refills", 0)) for row in state.metrics.rows)
    batch, copies = state.step + refills + ahead, range(state.config.num_generations)
    return [state.prompts[i] for i in state.prompt_order(batch) for _ in copies]


def own_rows(state: State, rows: int) -> slice:
    """The rows of a step that this process samples: all responses to its part of the prompts."""
    copies = state.config.num_generations
    part = state.world.part(rows // copies)
    return slice(part.start * copies, part.stop * copies)


def cache_bytes(roles: Roles) -> int:
    """Bytes of one token's keys and values in all layers, as if no layer had a sliding window.

    States that do not grow with the length do not count.
    """
    layers = getattr(roles.one_token_cache(), "layers", ())
    held = (x for layer in layers for x in vars(layer).values() if isinstance(x, Tensor))
    return sum(x.nbytes for x in held if x.is_floating_point())


def cache_budget(roles: Roles, sampling: Sampling, plan: Plan | None = None) -> float:
    """Bytes that the KV cache may take: `rollout_kv_cache_gib`, or 80% of what a GPU has left.

    What is left is the GPU's total memory minus what the memory plan says is taken in a rollout
    (without a plan: the weights of the roles). Memory that happens to be free now is not asked for,
    so that a repeated run splits its prompts in the same way.
    """
    if sampling.kv_cache_gib is not None:
        return sampling.kv_cache_gib * 2**30
    if roles.device.type != "cuda":
        return float("inf")
    total = torch.cuda.get_device_properties(roles.device).total_memory
    if plan is not None:
        return 0.8 * max(0, total - plan.stays_in_rollout)
    parameters = {p for place in roles.places.values() for p in place.model.parameters()}
    streamed = {
        id(x)
        for place in roles.places.values()
        if (streams := getattr(place.base, "streamed", None)) is not None
        for packed in streams.packed
        for x in packed.tensors
    }
    weights = sum(p.nbytes for p in parameters if id(p) not in streamed)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return 0.8 * (total - weights - 12 * trained - RESERVE)


def number_of_slots(
    prompts: list[Prompt],
    new_tokens: int,
    token_bytes: int,
    budget: float,
    most: int | None = None,
) -> int:
    """How many rows are sampled at a time: at most `most`, and as the KV cache's budget allows.

    A slot is as wide as the longest prompt and `new_tokens`. There is one at least.
    """
    rows = min(len(prompts), most or len(prompts))
    longest = max(len(prompt.ids) for prompt in prompts)
    if rows * cache_width(longest, new_tokens, rows < len(prompts)) * token_bytes > budget:
        rows = int(budget / (cache_width(longest, new_tokens, True) * token_bytes))
    return max(1, rows)


def most_rows(roles: Roles, budgets: Budgets | None) -> int | None:
    """The most rows that are sampled at a time: `generation_batch`; None is no limit.

    On a CPU there are no more than its layers for few rows take: with that many, decoding is bound
    by its products and not by reading the weights, and a row's result is the same in any batch.
    """
    most = None if budgets is None else budgets.generation_batch
    base: Any = roles.base
    head = base.get_output_embeddings()
    if not runs_native(head.weight):
        return most
    return min(MOST_ROWS, most or MOST_ROWS)


def row_batch_note(roles: Roles) -> str | None:
    """A note if the actor's or the reference's cache cannot be slots; None if both can."""
    for role in ("actor", "reference"):
        with roles.use(role):
            if windows_of(roles.one_token_cache()) is None:
                return (
                    f"{roles.base.config.model_type} caches more than keys and values: responses "
                    "are sampled in batches, each as long as its longest response"
                )
    return None


def should_merge_adapter(roles: Roles, sampling: Sampling) -> bool:
    """Whether to sample with the adapter merged into the weights: `rollout_merge_adapter` if set.

    Otherwise the adapter is merged if that loses no precision and the merged copies take at most a
    quarter of the device's total memory (not of the free memory, so that a repeated run decides in
    the same way).
    """
    if roles.sharding is not None:
        return False  # a merged copy would be of the whole weights
    if sampling.merge_adapter is not None:
        return sampling.merge_adapter
    if roles.device.type == "cuda":
        total = torch.cuda.get_device_properties(roles.device).total_memory
    else:
        total = psutil.virtual_memory().total
    return merge_is_exact(roles.base) and merged_weight_bytes(roles.base) <= total // 4


@torch.no_grad()
def sample(
    roles: Roles,
    prompts: list[Prompt],
    *,
    sampling: Sampling,
    template: Template,
    tokenizer: Any,
    seed: int,
    first_row: int = 0,
    budgets: Budgets | None = None,
    plan: Plan | None = None,
    engine: Engine | None = None,
) -> Rollout:
    """Sample a response of the active role to each prompt.

    A token is drawn by a number of seed, row and position: but for rounding, a row's response is
    the same whatever ran before, beside it, or in which batch.

    Args:
        sampling: the distribution that responses are drawn from.
        first_row: the number of the first prompt, if the prompts are a part of a larger set.
        budgets: `generation_batch` limits how many prompts run as one batch; None is no limit.
        plan: says how much memory of the GPU is taken, and so how much the KV cache may take.
        engine: samples in place of the model here, if it has the active role's policy.

    Returns:
        Rows of prompt and response, padded on the right.
    """
    roles.eval()
    if engine is not None and engine.serves(roles):
        how: dict[str, Any] = {"sampling": sampling, "template": template, "tokenizer": tokenizer}
        answers = engine.sample(roles, prompts, seed=seed, first_row=first_row, **how)
        return make_rollout(prompts, answers, template, tokenizer, roles.device)
    draws, stops = Draws(sampling, seed, first_row), Stops(sampling, template, tokenizer)
    merges = should_merge_adapter(roles, sampling)
    merging = merge_active_adapters(roles.base) if merges else nullcontext()
    faster = use_cpu_layers(roles.base) if roles.sharding is None else nullcontext()
    with merging, faster, roles.precision():
        budget = cache_budget(roles, sampling, plan)
        most = most_rows(roles, budgets)
        windows = windows_of(roles.one_token_cache())
        token_bytes = cache_bytes(roles) if math.isfinite(budget) else 0
        limits = (prompts, sampling.max_new_tokens, token_bytes, budget, most)
        if windows is None or sampling.cache_implementation == "static":
            answers = sample_row_batches(
                roles, prompts, split_prompts(*limits), draws, template, tokenizer
            )
        else:
            sampler = Sampler(roles, draws, stops, slots=number_of_slots(*limits), windows=windows)
            answers = sampler.run(prompts)
    return make_rollout(prompts, answers, template, tokenizer, roles.device)


def settings(state: State) -> dict[str, Any]:
    """The arguments of `sample` that are the same in the whole run."""
    return {
        "sampling": Sampling.of(state.config),
        "template": state.template,
        "tokenizer": state.tokenizer,
        "budgets": state.budgets,
        "plan": state.plan,
        "engine": state.engine,
    }


def pad_right(rows: list[list[int]], pad_id: int, device: torch.device) -> Tensor:
    """Token ids (B, T), each row filled up with `pad_id` on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)


def make_rollout(
    prompts: list[Prompt],
    answers: list[Answer],
    template: Template,
    tokenizer: Any,
    device: torch.device,
) -> Rollout:
    """The rollout of these answers: each row is a prompt and its response, padded on the right."""
    rows = [prompt.ids + answer.ids for prompt, answer in zip(prompts, answers, strict=True)]
    return Rollout(
        prompts=prompts,
        input_ids_BT=pad_right(rows, template.pad_id, device),
        prompt_lengths=[len(prompt.ids) for prompt in prompts],
        response_lengths=[len(answer.ids) for answer in answers],
        terminated=[answer.terminated for answer in answers],
        sampler_logprob_N=torch.cat([answer.logprob_N for answer in answers]),
        texts=[
            tokenizer.decode(answer.ids, skip_special_tokens=True).strip() for answer in answers
        ],
    )
