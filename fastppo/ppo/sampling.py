"""Sampling: the distribution of responses, how a token is drawn, and when a response ends.

A draw is one uniform number, put through the inverse of the distribution function. The number is a
hash of seed, row and position, so what is drawn for a row depends neither on the rows beside it nor
on when it is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastppo.errors import UserError
from fastppo.seeds import seed_of

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.templates import Template

# Tokens that are summed before the search for one among them.
BLOCK: Final = 256
# No token has this id: it stands for what is before the beginning of a row.
NO_TOKEN: Final = 2**31 - 1


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


@dataclass(frozen=True)
class Answer:
    """A response up to and including its stop token, and the sampler's log-prob of each token."""

    ids: list[int]
    terminated: bool
    logprob_N: Tensor


def splitmix64(key: int, count: int) -> NDArray[np.uint64]:
    """The first `count` numbers of the generator SplitMix64, uint64.

    Source: Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators.
    """
    x = np.array([key], dtype=np.uint64)
    x = x + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, row: int, count: int) -> NDArray[np.float64]:
    """The uniform numbers of a row's first `count` tokens, float64 in [0, 1).

    They are multiples of 2**-52, so that u * total < total in float64 for any total.
    """
    numbers = splitmix64(seed_of(seed, "row", row), count)
    return (numbers >> np.uint64(12)).astype(np.float64) * 2.0**-52


def inverse_cdf(scores_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The tokens (B,) at which the distributions' cumulative sums exceed the uniform numbers.

    First the block of BLOCK tokens is found, then the token in it: so nothing is as large as the
    logits but their softmax.

    Args:
        scores_BV: float32 logits; a token of -inf is never drawn.
        uniform_B: float64, in [0, 1 - 2**-52].
    """
    p_BV, vocab = scores_BV.softmax(-1), scores_BV.shape[1]
    whole = vocab - vocab % BLOCK
    sums = [p_BV[:, :whole].view(len(p_BV), -1, BLOCK).sum(-1)] if whole else []
    sums += [p_BV[:, whole:].sum(-1, keepdim=True)] if whole < vocab else []
    sum_BK = torch.cat(sums, 1).double()
    cdf_BK = sum_BK.cumsum(1)
    at_B1 = uniform_B[:, None] * cdf_BK[:, -1:]
    block_B1 = torch.searchsorted(cdf_BK, at_B1, right=True)
    own_B1 = sum_BK.gather(1, block_B1)
    share_B1 = (at_B1 - (cdf_BK.gather(1, block_B1) - own_B1)) / own_B1
    token_BN = block_B1 * BLOCK + torch.arange(BLOCK, device=scores_BV.device)
    inside_BN = p_BV.gather(1, token_BN.clamp(max=vocab - 1)).double() * (token_BN < vocab)
    cdf_BN = inside_BN.cumsum(1)
    at_B1 = share_B1.clamp(0.0, 1 - 2.0**-52) * cdf_BN[:, -1:]
    found_B1 = torch.searchsorted(cdf_BN, at_B1, right=True)
    return (block_B1 * BLOCK + found_B1).squeeze(1)


class Draws:
    """Draws the next token of each row, and gives its log-prob.

    Args:
        sampling: the distribution.
        seed: of this rollout.
        first_row: the number of the rollout's first row, if it is a part of a larger one.
    """

    def __init__(self, sampling: Sampling, seed: int, first_row: int = 0) -> None:
        self.sampling, self.seed, self.first_row = sampling, seed, first_row
        self.processors = sampling.processors()
        self.numbers: dict[int, NDArray[np.float64]] = {}

    def uniform(self, row: int, position: int) -> float:
        """The number that draws the token at `position` of the response in `row`."""
        if row not in self.numbers:
            count = self.sampling.max_new_tokens
            self.numbers[row] = uniforms(self.seed, self.first_row + row, count)
        return float(self.numbers[row][position])

    def draw(
        self, ids_BT: Tensor, scores_BV: Tensor, rows: Sequence[int], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B,) and their log-probs, float32 (B,), in the distribution they are drawn from.

        Args:
            ids_BT: the tokens so far, for the repetition penalty.
            scores_BV: float32 logits of the next token.
            rows: the number of each row in the rollout.
            positions: how many tokens each response has already.
        """
        for processor in self.processors:
            scores_BV = processor(ids_BT, scores_BV)
        if self.sampling.do_sample:
            numbers = [self.uniform(*at) for at in zip(rows, positions, strict=True)]
            uniform_B = torch.tensor(numbers, dtype=torch.float64)
            # A GPU is still at work on the logits: do not wait for it here.
            uniform_B = uniform_B.to(scores_BV.device, non_blocking=True)
            token_B = inverse_cdf(scores_BV, uniform_B)
        else:
            token_B = scores_BV.argmax(-1)
        chosen_B = scores_BV.gather(1, token_B[:, None]).squeeze(1)
        return token_B, chosen_B - scores_BV.logsumexp(1)


class DrawInGenerate(LogitsProcessor):
    """`Draws` as the last logits processor of transformers' generate with do_sample=False.

    It leaves one token to choose in each row, and records its log-prob; only the logits of one step
    are in memory, where generate(output_scores=True) keeps those of all.
    """

    def __init__(self, draws: Draws, rows: Sequence[int]) -> None:
        self.draws, self.rows = draws, rows
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        positions = [len(self.columns)] * len(self.rows)
        token_B, logprob_B = self.draws.draw(input_ids, scores.float(), self.rows, positions)
        self.columns.append(logprob_B)
        only_BV = torch.full_like(scores, -torch.inf)
        return only_BV.scatter_(1, token_B[:, None], 0.0)


class StopStrings:
    """transformers' search for stop strings, over the last tokens of each row."""

    def __init__(self, tokenizer: Any, strings: tuple[str, ...]) -> None:
        self.search = StopStringCriteria(tokenizer, list(strings))

    def found(self, rows: Sequence[list[int]]) -> list[bool]:
        """Whether the last token of each row (prompt and response so far) completes a string."""
        most = self.search.maximum_token_len
        tails = [[NO_TOKEN] * (most - len(row)) + row[-most:] for row in rows]
        found_B: Tensor = self.search(torch.tensor(tails), None)
        return [bool(found) for found in found_B.tolist()]


class Stops:
    """When a response ends: stop tokens, stop strings, `min_new_tokens` and `max_new_tokens`."""

    def __init__(self, sampling: Sampling, template: Template, tokenizer: Any) -> None:
        self.ids, self.sampling = template.stop_ids, sampling
        strings = template.stop_strings
        self.strings = StopStrings(tokenizer, strings) if strings else None

    def forbid(self, scores_BV: Tensor, positions: Sequence[int]) -> Tensor:
        """The logits, with -inf for stop tokens in rows that have fewer than `min_new_tokens`."""
        early = [b for b, n in enumerate(positions) if n < self.sampling.min_new_tokens]
        if early and self.ids:
            at = torch.tensor(early, device=scores_BV.device)[:, None]
            ids = torch.tensor(self.ids, device=scores_BV.device)[None]
            scores_BV = scores_BV.index_put((at, ids), scores_BV.new_tensor(-torch.inf))
        return scores_BV

    def ended(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[bool | None]:
        """For each (prompt, response so far): whether it ended by itself, None if it has not ended.

        False is a response that has `max_new_tokens` and no stop.
        """
        strings = [False] * len(rows)
        if self.strings is not None:
            strings = self.strings.found([prompt + ids for prompt, ids in rows])
        return [
            True
            if found or ids[-1] in self.ids
            else (False if len(ids) >= self.sampling.max_new_tokens else None)
            for (_, ids), found in zip(rows, strings, strict=True)
        ]
