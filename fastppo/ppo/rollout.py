"""Prompt -> Rollout: sample responses in batches as large as the memory for the KV cache allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from fastppo.memory.units import RESERVE
from fastppo.ppo.sampling import (
    RecordLogprobs,
    Sampling,
    StopStrings,
    merge_active_adapters,
    merge_is_exact,
    merged_weight_bytes,
    use_few_rows_kernels,
)
from fastppo.seeds import seed_of
from fastppo.types import Prompt, Rollout

if TYPE_CHECKING:
    from fastppo.memory.budgets import Budgets
    from fastppo.memory.plan import Plan
    from fastppo.models.build import Roles
    from fastppo.ppo.state import State
    from fastppo.templates import Template


def next_prompts(state: State) -> list[Prompt]:
    """The prompts of the next step, each repeated `num_generations` times."""
    copies = range(state.config.num_generations)
    return [state.prompts[i] for i in state.prompt_order(state.step) for _ in copies]


def left_pad(prompts: list[Prompt], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompt ids and their mask, both int64 (B, P), padded on the left."""
    width = max(len(prompt.ids) for prompt in prompts)
    rows = [[pad_id] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts]
    mask = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def response_length(
    token_row: list[int], stop_ids: tuple[int, ...], stop_string: int | None = None
) -> tuple[int, bool]:
    """Number of tokens up to and including the first stop token, and whether there is one.

    Pad tokens are not counted, because a model's pad token may be its EOS. `stop_string` is the
    length at which a stop string was complete.
    """
    for position, token in enumerate(token_row[:stop_string]):
        if token in stop_ids:
            return position + 1, True
    if stop_string is not None:
        return stop_string, True
    return len(token_row), False


@torch.no_grad()
def cache_bytes(roles: Roles) -> int:
    """Bytes of one token's keys and values in all layers, as if no layer had a sliding window.

    They are measured in a forward of one token, because the keys of config.json that give number
    and width of the cached heads differ between families.
    """
    embeddings: Any = roles.base.get_input_embeddings()
    ids_BT = torch.zeros(1, 1, dtype=torch.long, device=embeddings.weight.device)
    with roles.precision():
        cache = roles.trunk(input_ids=ids_BT, use_cache=True).past_key_values
    held = (x for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor))
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


def split_prompts(
    prompts: list[Prompt],
    new_tokens: int,
    token_bytes: int,
    budget: float,
    most: int | None = None,
) -> list[list[int]]:
    """Indices of the prompts in each batch of sampling.

    A batch has at most `most` prompts, and its KV cache takes at most `budget` bytes. If there are
    several batches, prompts of similar length share one; no batch is empty.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    groups: list[list[int]] = [[]]
    for i in order:
        rows = len(groups[-1]) + 1
        wanted = rows * (len(prompts[i].ids) + new_tokens) * token_bytes
        if groups[-1] and (wanted > budget or rows > (most or rows)):
            groups.append([])
        groups[-1].append(i)
    return groups if len(groups) > 1 else [list(range(len(prompts)))]


def should_merge_adapter(roles: Roles, sampling: Sampling) -> bool:
    """Whether to sample with the adapter merged into the weights: `rollout_merge_adapter` if set.

    Otherwise the adapter is merged if that loses no precision and the merged copies take at most a
    quarter of the device's total memory (not of the free memory, so that a repeated run decides in
    the same way).
    """
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
    budgets: Budgets | None = None,
    plan: Plan | None = None,
) -> Rollout:
    """Sample a response of the active role to each prompt.

    The same seed gives the same responses, whatever ran before: each call has a generator of its
    own.

    Args:
        sampling: the distribution that responses are drawn from.
        budgets: `generation_batch` limits how many prompts run as one batch; None is no limit.
        plan: says how much memory of the GPU is taken, and so how much the KV cache may take.

    Returns:
        Rows of prompt and response, padded on the right.
    """
    roles.eval()
    budget = cache_budget(roles, sampling, plan)
    groups = split_prompts(
        prompts,
        sampling.max_new_tokens,
        cache_bytes(roles) if math.isfinite(budget) else 0,
        budget,
        None if budgets is None else budgets.generation_batch,
    )
    answers: dict[int, Answer] = {}
    merging = (
        merge_active_adapters(roles.base)
        if should_merge_adapter(roles, sampling)
        else nullcontext()
    )
    with merging, use_few_rows_kernels(roles.base):
        for number, rows in enumerate(groups):
            group = [prompts[row] for row in rows]
            group_seed = seed_of(seed, "group", number)
            found = generate(roles, group, sampling, template, tokenizer, group_seed)
            answers |= zip(rows, found, strict=True)
    in_order = [answers[row] for row in range(len(prompts))]
    return make_rollout(prompts, in_order, template, tokenizer, roles.device)


@dataclass(frozen=True)
class Answer:
    """A response up to and including its stop token, and the sampler's log-prob of each token."""

    ids: list[int]
    terminated: bool
    logprob_N: Tensor


def generate(
    roles: Roles,
    prompts: list[Prompt],
    sampling: Sampling,
    template: Template,
    tokenizer: Any,
    seed: int,
) -> list[Answer]:
    """Sample responses to prompts that run as one batch."""
    base: Any = roles.base
    prompt_BP, mask_BP = left_pad(prompts, template.pad_id, roles.device)
    record = RecordLogprobs()
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        do_sample=sampling.do_sample,
        eos_token_id=list(template.stop_ids),
        pad_token_id=template.pad_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
        num_beams=1,
        # The processors below apply these settings, before RecordLogprobs. A field that is None
        # here would be filled from the model's own generation_config.
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
    )
    if sampling.cache_implementation == "static":
        generation.cache_implementation = "static"  # on CUDA transformers compiles decoding with it
    strings = StopStrings(tokenizer, template.stop_strings) if template.stop_strings else None
    devices = [roles.device] if roles.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        generation_config_of(base, generation),
        roles.precision(),
    ):
        torch.manual_seed(seed)
        tokens = base.generate(
            input_ids=prompt_BP,
            attention_mask=mask_BP,
            generation_config=generation,
            logits_processor=LogitsProcessorList([*sampling.processors(), record]),
            stopping_criteria=StoppingCriteriaList([] if strings is None else [strings]),
        )
    record.record_sampled(tokens[:, -1])
    return truncate_at_stop(
        tokens[:, prompt_BP.shape[1] :],
        torch.stack(record.columns, dim=1),
        template.stop_ids,
        None if strings is None else strings.lengths(),
    )


def truncate_at_stop(
    response_BR: Tensor,
    logprob_BR: Tensor,
    stop_ids: tuple[int, ...],
    stop_strings: list[int | None] | None = None,
) -> list[Answer]:
    """Cut each row after its stop token, or after the token that completed a stop string."""
    answers = []
    for b, row in enumerate(response_BR.tolist()):
        length, ended = response_length(row, stop_ids, stop_strings[b] if stop_strings else None)
        answers.append(Answer(row[:length], ended, logprob_BR[b, :length]))
    return answers


@contextmanager
def generation_config_of(model: Any, generation: GenerationConfig) -> Iterator[None]:
    """Inside the block `generation` is the model's own generation_config, and its KV cache is on.

    transformers fills unset fields of a configuration that is passed to `generate` from the model's
    own (Qwen2.5-Instruct has repetition_penalty 1.05 and top_k 20 there), so that responses would
    be sampled from another distribution than the policy's.
    """
    config = model.config.get_text_config()  # a multimodal model's own config has no cache
    before, use_cache = model.generation_config, config.use_cache
    model.generation_config, config.use_cache = generation, True
    try:
        yield
    finally:
        model.generation_config, config.use_cache = before, use_cache


def make_rollout(
    prompts: list[Prompt],
    answers: list[Answer],
    template: Template,
    tokenizer: Any,
    device: torch.device,
) -> Rollout:
    """The rollout of these answers: each row is a prompt and its response, padded on the right."""
    rows = [prompt.ids + answer.ids for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    padded = [row + [template.pad_id] * (width - len(row)) for row in rows]
    return Rollout(
        prompts=prompts,
        input_ids_BT=torch.tensor(padded, device=device),
        prompt_lengths=[len(prompt.ids) for prompt in prompts],
        response_lengths=[len(answer.ids) for answer in answers],
        terminated=[answer.terminated for answer in answers],
        sampler_logprob_N=torch.cat([answer.logprob_N for answer in answers]),
        texts=[
            tokenizer.decode(answer.ids, skip_special_tokens=True).strip() for answer in answers
        ],
    )
