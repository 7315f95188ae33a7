"""Prompt -> Rollout: sample the whole batch at once, as far as the cache has room."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from fastppo.memory.units import RESERVE
from fastppo.models.decoding import (
    merge_active_adapters,
    merge_is_exact,
    merged_weight_bytes,
    use_few_rows_kernels,
)
from fastppo.models.load import causal_lm
from fastppo.ppo.sampling import RecordLogprobs, Sampling, StopStrings
from fastppo.seeds import seed_of
from fastppo.types import Prompt, Rollout

if TYPE_CHECKING:
    from fastppo.memory.plan import Plan
    from fastppo.models.build import Roles
    from fastppo.templates import Template


def left_pad(prompts: list[Prompt], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompt ids and their mask, both int64 (B, P), the last token of each in the last column."""
    width = max(len(prompt.ids) for prompt in prompts)
    rows = [[pad_id] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts]
    mask = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def response_length(
    token_row: list[int], stop_ids: tuple[int, ...], stop_string: int | None = None
) -> tuple[int, bool]:
    """Tokens up to and with the first stop token, and whether there was one.

    By position and not by pad tokens: a model whose pad is its EOS keeps exactly one of them.
    `stop_string` is the length at which a stop string was complete.
    """
    for position, token in enumerate(token_row[:stop_string]):
        if token in stop_ids:
            return position + 1, True
    if stop_string is not None:
        return stop_string, True
    return len(token_row), False


def cache_bytes(model: Any) -> int:
    """Keys and values of a token, over all layers (sliding windows are not taken off)."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize


def cache_budget(roles: Roles, sampling: Sampling, plan: Plan | None = None) -> float:
    """Bytes that the cache may take: `rollout_kv_cache_gib`, or what a GPU has left.

    What lies there is the memory plan's to say: it knows reward models, and what is streamed.
    From what the device has in all, not from what is free now: a run and its repetition split
    their prompts alike. Without a plan only the models with a role are known.
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
        if (streams := getattr(causal_lm(place.model), "streamed", None)) is not None
        for packed in streams.packed
        for x in packed.tensors
    }
    weights = sum(p.nbytes for p in parameters if id(p) not in streamed)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return 0.8 * (total - weights - 12 * trained - RESERVE)


def split(
    prompts: list[Prompt],
    new_tokens: int,
    token_bytes: int,
    budget: float,
    most: int | None = None,
) -> list[list[int]]:
    """Which prompts are answered together: `most`, or as many as the cache has room for.

    Where there are several groups, prompts of similar length are in one; no group is empty.
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


def merges(roles: Roles, sampling: Sampling) -> bool:
    """`rollout_merge_adapter`, or: where nothing is lost by it, and the copies fit easily.

    A quarter of the device's memory in all, and not what is free now: a repetition decides alike.
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
    most: int | None = None,
    plan: Plan | None = None,
) -> Rollout:
    """Responses of the active role to `prompts`, in the layout of everything that follows.

    The same seed gives the same responses: the generator is this call's own, so that what ran
    before (or whether it ran, after a resume) does not matter. No more than `most` prompts are
    answered at a time, nor more than a GPU has room for beside what `plan` says lies there.
    """
    roles.eval()
    budget = cache_budget(roles, sampling, plan)
    groups = split(prompts, sampling.max_new_tokens, cache_bytes(roles.base), budget, most)
    answers: list[Answer | None] = [None] * len(prompts)
    merging = merge_active_adapters(roles.base) if merges(roles, sampling) else nullcontext()
    with merging, use_few_rows_kernels(roles.base):
        for number, rows in enumerate(groups):
            own = [prompts[i] for i in rows]
            drawn = seed_of(seed, "group", number)
            found = generate(roles, own, sampling, template, tokenizer, drawn)
            for i, answer in zip(rows, found, strict=True):
                answers[i] = answer
    done = [answer for answer in answers if answer is not None]
    return lay_out(prompts, done, template, tokenizer, roles.device)


@dataclass(frozen=True)
class Answer:
    """A response up to and with what ended it, and the sampler's log-prob of each token."""

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
    """Answers to prompts that are sampled together."""
    prompt_BP, mask_BP = left_pad(prompts, template.pad_id, roles.device)
    record = RecordLogprobs()
    generation = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        do_sample=sampling.do_sample,
        eos_token_id=list(template.stop_ids),
        pad_token_id=template.pad_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
        num_beams=1,
        # The chain below does these, in full view of the recorder. What is left None here would be
        # filled from the model's own generation_config.
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
    )
    if sampling.cache_implementation == "static":
        generation.cache_implementation = "static"  # on CUDA transformers compiles its steps
    strings = StopStrings(tokenizer, template.stop_strings) if template.stop_strings else None
    devices = [roles.device] if roles.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), only(roles.base, generation), roles.precision():
        torch.manual_seed(seed)
        tokens = roles.base.generate(
            input_ids=prompt_BP,
            attention_mask=mask_BP,
            generation_config=generation,
            logits_processor=LogitsProcessorList([*sampling.processors(), record]),
            stopping_criteria=StoppingCriteriaList([] if strings is None else [strings]),
        )
    record.take(tokens[:, -1])
    return cut(
        tokens[:, prompt_BP.shape[1] :],
        torch.stack(record.columns, dim=1),
        template.stop_ids,
        None if strings is None else strings.lengths(),
    )


def cut(
    response_BR: Tensor,
    logprob_BR: Tensor,
    stop_ids: tuple[int, ...],
    stop_strings: list[int | None] | None = None,
) -> list[Answer]:
    """Each row up to its stop token, or to the token that completed a stop string."""
    answers = []
    for b, row in enumerate(response_BR.tolist()):
        length, ended = response_length(row, stop_ids, stop_strings[b] if stop_strings else None)
        answers.append(Answer(row[:length], ended, logprob_BR[b, :length]))
    return answers


class only:
    """For the length of a block the model has no generation_config but this one.

    transformers fills unset fields of a passed configuration from the model's (Qwen2.5-Instruct
    brings repetition_penalty 1.05 and top_k 20), which would make the sampler another policy.
    """

    def __init__(self, model: Any, generation: GenerationConfig) -> None:
        self.model, self.generation = model, generation

    def __enter__(self) -> None:
        self.own = self.model.generation_config
        self.own_use_cache = self.model.config.use_cache
        self.model.generation_config = self.generation
        self.model.config.use_cache = True

    def __exit__(self, *_: object) -> None:
        self.model.generation_config = self.own
        self.model.config.use_cache = self.own_use_cache


def lay_out(
    prompts: list[Prompt],
    answers: list[Answer],
    template: Template,
    tokenizer: Any,
    device: torch.device,
) -> Rollout:
    """Prompt and response side by side, padded right."""
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
