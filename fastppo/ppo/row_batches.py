"""Sampling in batches of rows that begin and end together, by transformers' own generate.

For models whose cache cannot be slots (states of linear attention, convolutions), and for
`cache_implementation: static`, whose decoding transformers compiles. The tokens are drawn as by the
sampler, from the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from fastppo.ppo.sampling import Answer, DrawInGenerate, Draws, StopStrings

if TYPE_CHECKING:
    from fastppo.models.build import Roles
    from fastppo.templates import Template
    from fastppo.types import Prompt


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


def sample_row_batches(
    roles: Roles,
    prompts: list[Prompt],
    groups: list[list[int]],
    draws: Draws,
    template: Template,
    tokenizer: Any,
) -> list[Answer]:
    """The answers to the prompts, in their order; each group of them runs as one batch."""
    answers: dict[int, Answer] = {}
    for rows in groups:
        group = [prompts[row] for row in rows]
        found = generate(roles, group, DrawInGenerate(draws, rows), template, tokenizer)
        answers |= zip(rows, found, strict=True)
    return [answers[row] for row in range(len(prompts))]


class StopAtStrings(StoppingCriteria):
    """`StopStrings` for generate; records the step at which each row completed a string."""

    def __init__(self, strings: StopStrings) -> None:
        self.strings = strings
        self.columns: list[list[bool]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        found = self.strings.found(input_ids.tolist())
        self.columns.append(found)
        return torch.tensor(found, device=input_ids.device)

    def lengths(self) -> list[int | None]:
        """For each response, the number of tokens up to the one that completes a stop string."""
        rows = zip(*self.columns, strict=True)
        return [row.index(True) + 1 if True in row else None for row in rows]


def generate(
    roles: Roles,
    prompts: list[Prompt],
    draw: DrawInGenerate,
    template: Template,
    tokenizer: Any,
) -> list[Answer]:
    """Sample responses to prompts that run as one batch."""
    base: Any = roles.base
    sampling = draw.draws.sampling
    prompt_BP, mask_BP = left_pad(prompts, template.pad_id, roles.device)
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        do_sample=False,  # `draw` has drawn, and leaves one token to choose
        eos_token_id=list(template.stop_ids),
        pad_token_id=template.pad_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
        num_beams=1,
        # A field that is None here would be filled from the model's own generation_config.
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
    )
    if sampling.cache_implementation == "static":
        generation.cache_implementation = "static"  # on CUDA transformers compiles decoding with it
    strings = template.stop_strings
    stop = StopAtStrings(StopStrings(tokenizer, strings)) if strings else None
    with generation_config_of(base, generation), roles.precision():
        tokens = base.generate(
            input_ids=prompt_BP,
            attention_mask=mask_BP,
            generation_config=generation,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([] if stop is None else [stop]),
        )
    return truncate_at_stop(
        tokens[:, prompt_BP.shape[1] :],
        torch.stack(draw.columns, dim=1),
        template.stop_ids,
        None if stop is None else stop.lengths(),
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
