"""The distribution that responses are sampled from, and classes that record what generate does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastppo.errors import UserError

if TYPE_CHECKING:
    from fastppo.config import Config


@dataclass(frozen=True)
class Sampling:
    """All settings of the sampler; the model's own generation_config is ignored."""

    max_new_tokens: int
    min_new_tokens: int = 0
    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    # These change speed and memory, not the distribution.
    kv_cache_gib: float | None = None
    merge_adapter: bool | None = None
    cache_implementation: str = "dynamic"

    @classmethod
    def of(cls, config: Config) -> Sampling:
        """The settings that the configuration asks for."""
        return cls(
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            do_sample=config.do_sample,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            repetition_penalty=config.repetition_penalty,
            kv_cache_gib=config.rollout_kv_cache_gib,
            merge_adapter=config.rollout_merge_adapter,
            cache_implementation=config.cache_implementation,
        )

    def check(self, device: torch.device) -> None:
        """Raise UserError for settings that the device cannot run."""
        if self.cache_implementation == "static" and device.type != "cuda":
            raise UserError(
                "cache_implementation: static is for decoding that is compiled, on a CUDA device, "
                "and there is none; leave it out"
            )

    @property
    def truncates(self) -> list[str]:
        """Names of the settings that make the sampler's distribution differ from the policy's."""
        off = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "do_sample": True}
        return [name for name, value in off.items() if getattr(self, name) != value]

    def processors(self) -> list[LogitsProcessor]:
        """transformers' logits processors for these settings, in transformers' order."""
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
    """Records the log-prob of each sampled token; only the logits of one step are in memory.

    A token is chosen after this processor has run, so the log-probs of step t are gathered at step
    t + 1. transformers' generate(output_scores=True) keeps the scores of all steps: (T, B, V).
    """

    def __init__(self) -> None:
        self.columns: list[Tensor] = []
        self.pending_BV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.pending_BV is not None:
            self.record_sampled(input_ids[:, -1])
        self.pending_BV = scores
        return scores

    def record_sampled(self, token_B: Tensor) -> None:
        """Record the log-probs of the tokens (B,) that were sampled from the last logits."""
        assert self.pending_BV is not None
        pending = self.pending_BV.float()
        chosen_B = pending.gather(1, token_B[:, None]).squeeze(1)
        self.columns.append(chosen_B - pending.logsumexp(1))
        self.pending_BV = None


class StopStrings(StoppingCriteria):
    """transformers' search for stop strings; records the step at which each row completed one."""

    def __init__(self, tokenizer: Any, strings: tuple[str, ...]) -> None:
        self.search = StopStringCriteria(tokenizer, list(strings))
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        found_B: Tensor = self.search(input_ids, scores)
        self.columns.append(found_B)
        return found_B

    def lengths(self) -> list[int | None]:
        """For each response, the number of tokens up to the one that completes a stop string."""
        rows = torch.stack(self.columns, dim=1).tolist()
        return [row.index(True) + 1 if True in row else None for row in rows]
