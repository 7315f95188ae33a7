"""Prompt -> Rollout: sample the whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastppo.types import Prompt, Rollout

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.roles import Roles
    from fastppo.templates import Template


@dataclass(frozen=True)
class Sampling:
    """Every setting of the sampler; nothing is left to the model's own generation_config."""

    max_new_tokens: int
    min_new_tokens: int = 0
    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, config: Config) -> Sampling:
        """The sampling that the YAML asks for."""
        return cls(
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            do_sample=config.do_sample,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            repetition_penalty=config.repetition_penalty,
        )

    @property
    def truncates(self) -> list[str]:
        """The settings that make the sampler another distribution than the one that trains."""
        off = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "do_sample": True}
        return [name for name, value in off.items() if getattr(self, name) != value]

    def processors(self) -> list[LogitsProcessor]:
        """transformers' own processors, in its own order."""
        chain: list[LogitsProcessor] = []
        if self.repetition_penalty != 1.0:
            chain.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.do_sample and self.temperature != 1.0:
            chain.append(TemperatureLogitsWarper(self.temperature))
        if self.do_sample and self.top_k > 0:
            chain.append(TopKLogitsWarper(self.top_k))
        if self.do_sample and self.top_p < 1.0:
            chain.append(TopPLogitsWarper(self.top_p))
        return chain


class RecordLogprobs(LogitsProcessor):
    """Keeps the sampler's log-prob of each token it chose, and one row of logits, not a stack.

    A token is chosen after this runs, so the log-probs of step t are gathered at step t + 1.
    """

    def __init__(self) -> None:
        self.columns: list[Tensor] = []
        self.pending_BV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.pending_BV is not None:
            self.take(input_ids[:, -1])
        self.pending_BV = scores
        return scores

    def take(self, token_B: Tensor) -> None:
        """File the log-prob of the tokens that were chosen from the pending logits."""
        assert self.pending_BV is not None
        pending = self.pending_BV.float()
        chosen_B = pending.gather(1, token_B[:, None]).squeeze(1)
        self.columns.append(chosen_B - pending.logsumexp(1))
        self.pending_BV = None


def left_pad(prompts: list[Prompt], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompt ids and their mask, both int64 (B, P), the last token of each in the last column."""
    width = max(len(prompt.ids) for prompt in prompts)
    rows = [[pad_id] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts]
    mask = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def response_length(token_row: list[int], stop_ids: tuple[int, ...]) -> tuple[int, bool]:
    """Tokens up to and with the first stop token, and whether there was one.

    By position and not by pad tokens: a model whose pad is its EOS keeps exactly one of them.
    """
    for position, token in enumerate(token_row):
        if token in stop_ids:
            return position + 1, True
    return len(token_row), False


@torch.no_grad()
def sample(
    roles: Roles,
    prompts: list[Prompt],
    *,
    sampling: Sampling,
    template: Template,
    tokenizer: Any,
    seed: int,
) -> Rollout:
    """Responses of the active role to `prompts`, in the layout of everything that follows.

    The same seed gives the same responses: the generator is this call's own, so that what ran
    before (or whether it ran, after a resume) does not matter.
    """
    roles.eval()
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
    devices = [roles.device] if roles.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), only(roles.base, generation), roles.precision():
        torch.manual_seed(seed)
        tokens = roles.base.generate(
            input_ids=prompt_BP,
            attention_mask=mask_BP,
            generation_config=generation,
            logits_processor=LogitsProcessorList([*sampling.processors(), record]),
        )
    record.take(tokens[:, -1])
    return pack_rollout(prompts, tokens[:, prompt_BP.shape[1] :], record, template, tokenizer)


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


def pack_rollout(
    prompts: list[Prompt],
    response_BR: Tensor,
    record: RecordLogprobs,
    template: Template,
    tokenizer: Any,
) -> Rollout:
    """Cut each row at its stop token and lay prompt and response side by side, padded right."""
    rows = response_BR.tolist()
    logprob_BR = torch.stack(record.columns, dim=1)
    lengths, terminated = zip(
        *(response_length(row, template.stop_ids) for row in rows), strict=True
    )
    width = max(len(p.ids) + n for p, n in zip(prompts, lengths, strict=True))
    laid_out, logprobs, texts = [], [], []
    for b, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        ids = prompt.ids + rows[b][:length]
        laid_out.append(ids + [template.pad_id] * (width - len(ids)))
        logprobs.append(logprob_BR[b, :length])
        texts.append(tokenizer.decode(rows[b][:length], skip_special_tokens=True).strip())
    return Rollout(
        prompts=prompts,
        input_ids_BT=torch.tensor(laid_out, device=response_BR.device),
        prompt_lengths=[len(prompt.ids) for prompt in prompts],
        response_lengths=list(lengths),
        terminated=list(terminated),
        sampler_logprob_N=torch.cat(logprobs),
        texts=texts,
    )
