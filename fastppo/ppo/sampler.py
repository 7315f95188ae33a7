"""Continuous batching: a response that has ended leaves its slot, and a waiting prompt enters it.

It runs the model's own forward, on the weights that train. Equal prompts that follow each other
(`num_generations`) are run once; prompts are run in chunks of at most `PREFILL_TOKENS` tokens.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from fastppo.memory.units import PREFILL_TOKENS, SLACK
from fastppo.ppo.cpu_layers import Unsuited, can_run, slot_attention
from fastppo.ppo.sampling import Answer, Draws, Stops
from fastppo.ppo.slots import SlotCache

if TYPE_CHECKING:
    from fastppo.models.build import Roles
    from fastppo.types import Prompt


@dataclass
class Row:
    """A response that is being sampled: its place in the rollout, its tokens, their log-probs."""

    number: int
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """How many tokens the cache has: all but the last, whose keys the next step computes."""
        return len(self.prompt) + len(self.ids) - 1


class Prefilled(NamedTuple):
    """Prompts that have been run: their keys and values, and the logits after each."""

    prompts: list[list[int]]
    cache: DynamicCache
    logits_BV: Tensor


class Forward:
    """Calls the base of the active role: the logits of the last position, float32 (B, V)."""

    def __init__(self, roles: Roles) -> None:
        self.base, self.device, self.sharding = roles.base, roles.device, roles.sharding
        # None until the first step. Sharded layers must not stop in the midst of a pass.
        self.own_attention: bool | None = None if self.sharding is None else True
        taken = inspect.signature(self.base.forward).parameters
        self.takes_positions = "position_ids" in taken
        self.keep = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}

    def __call__(
        self, ids_BT: Tensor, mask: Tensor | None, positions_BT: Tensor, cache: Any
    ) -> Tensor:
        positions = {"position_ids": positions_BT} if self.takes_positions else {}
        if self.sharding is not None:
            self.sharding.begin_pass()
        out = self.base(
            input_ids=ids_BT,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **positions,
            **self.keep,
        )
        logits_BV: Tensor = out.logits[:, -1].float()
        return logits_BV

    def prompts(self, rows: list[list[int]]) -> Prefilled:
        """Run prompts, padded on the left, in chunks."""
        width, device = max(map(len, rows)), self.device
        padding = [width - len(row) for row in rows]
        # Any token will do for padding: it is masked.
        padded = [row[:1] * n + row for row, n in zip(rows, padding, strict=True)]
        ids_BT = torch.tensor(padded, device=device)
        n_B1 = torch.tensor(padding, device=device)[:, None]
        at_BT = torch.arange(width, device=device)[None] - n_B1
        mask_BT = (at_BT >= 0).long() if any(padding) else None
        cache = DynamicCache()  # without a config, so that windows do not shorten it
        logits_BV = ids_BT.new_empty(0)
        chunk = max(1, PREFILL_TOKENS // len(rows))
        for start in range(0, width, chunk):
            here = slice(start, start + chunk)
            mask = None if mask_BT is None else mask_BT[:, : start + chunk]
            logits_BV = self(ids_BT[:, here], mask, at_BT[:, here].clamp(min=0), cache)
        return Prefilled(rows, cache, logits_BV)

    def step(self, rows: list[Row], cache: SlotCache) -> Tensor:
        """Run the last token of each row; returns the logits of the next."""
        lengths = [row.cached for row in rows]
        cache.prepare(lengths)
        longest = cache.extent.longest
        ids_B1 = torch.tensor([row.ids[-1:] for row in rows], device=self.device)
        at_B1 = torch.tensor([[n] for n in lengths], device=self.device)
        logits_BV = self.step_natively(ids_B1, at_B1, lengths, cache)
        if logits_BV is None:
            mask = None
            if min(lengths) < longest:
                places_T = torch.arange(longest + 1, device=self.device)
                mask = places_T >= longest - at_B1
                mask = mask[:, None, None] if self.takes_whole_masks(cache) else mask.long()
            logits_BV = self(ids_B1, mask, at_B1, cache)
        cache.extent.end += 1
        return logits_BV

    def takes_whole_masks(self, cache: SlotCache) -> bool:
        """Whether the model takes a mask (B, 1, 1, T) as it is.

        From a mask (B, T) it makes its own, and looks on the host for padding first: on a GPU that
        waits for the device in every step.
        """
        config = self.base.config.get_text_config()
        return (
            config._attn_implementation == "sdpa"
            and bool(getattr(self.base, "_supports_attention_backend", False))
            and not any(layer.window for layer in cache.slot_layers)
            and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
        )

    def step_natively(
        self, ids_B1: Tensor, at_B1: Tensor, lengths: list[int], cache: SlotCache
    ) -> Tensor | None:
        """`step` with the kernel of `slot_attention`; None where the model's own attention runs."""
        if self.own_attention is None:
            self.own_attention = not can_run(self.base, cache)
        if self.own_attention:
            return None
        try:
            with slot_attention(self.base, cache, lengths):
                return self(ids_B1, None, at_B1, cache)
        except Unsuited:  # what has been written so far is written again
            self.own_attention = True
            return None


class Sampler:
    """Samples a response to each prompt, as many at a time as there are slots.

    Args:
        roles: the active role's base is sampled.
        draws: how a token is drawn.
        stops: when a response ends.
        slots: the most rows that are sampled at a time.
        windows: the sliding window of each layer, or None.
    """

    def __init__(
        self,
        roles: Roles,
        draws: Draws,
        stops: Stops,
        *,
        slots: int,
        windows: Sequence[int | None],
    ) -> None:
        self.forward, self.draws, self.stops = Forward(roles), draws, stops
        self.slots, self.windows = slots, windows
        # On a CPU a prompt is run alone: so it is the same bits in any order of the prompts.
        self.alone = roles.device.type == "cpu"
        self.answers: dict[int, Answer] = {}

    def run(self, prompts: list[Prompt]) -> list[Answer]:
        """The answers to the prompts, in their order."""
        self.sample_rows([Row(i, prompt.ids) for i, prompt in enumerate(prompts)])
        if self.forward.sharding is not None:
            self.forward.sharding.join_passes()
        return [self.answers[i] for i in range(len(prompts))]

    def sample_rows(self, rows: list[Row]) -> None:
        """Fill `answers` of these rows, which enter the slots in this order."""
        self.waiting = deque(rows)
        slots, longest = min(self.slots, len(rows)), max(len(row.prompt) for row in rows)
        width = cache_width(longest, self.draws.sampling.max_new_tokens, len(rows) > slots)
        self.cache = SlotCache(self.windows, slots, width, longest)
        self.rows: list[Row | None] = [None] * slots  # by slot
        self.prefilled: Prefilled | None = None  # whose last prompt is the next row's too
        while self.waiting or any(self.rows):
            while self.waiting and None in self.rows:
                self.admit()
            self.close_gaps()
            active = [row for row in self.rows if row is not None]
            if active:
                logits_BV = self.forward.step(active, self.cache)
                self.extend(active, list(range(len(active))), logits_BV)
            else:
                self.cache.restart()

    def admit(self) -> None:
        """Put waiting prompts into free slots, and draw the first token of each."""
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        made, p = self.prefilled, 0
        if made is None:
            made = self.forward.prompts(self.next_prompts(len(free)))
        else:
            p = len(made.prompts) - 1
        slots: list[list[int]] = [[] for _ in made.prompts]
        entered: list[tuple[Row, int]] = []
        while self.waiting and len(entered) < len(free):
            if self.waiting[0].prompt != made.prompts[p]:
                p += 1
            if p == len(made.prompts) or self.waiting[0].prompt != made.prompts[p]:
                break
            slots[p].append(free[len(entered)])
            entered.append((self.waiting.popleft(), p))
        for p, own in enumerate(slots):
            self.cache.admit(made.cache, p, len(made.prompts[p]), own)
        rows, of = [row for row, _ in entered], [p for _, p in entered]
        for slot, row in zip(free, rows, strict=False):
            self.rows[slot] = row
        again = self.waiting and self.waiting[0].prompt == made.prompts[-1]
        self.prefilled = made if again else None
        logits_BV = made.logits_BV[torch.tensor(of, device=self.forward.device)]
        self.extend(rows, free[: len(rows)], logits_BV)

    def next_prompts(self, rows: int) -> list[list[int]]:
        """The prompts of the next `rows` rows that fit one pass, equal neighbours once."""
        prompts: list[list[int]] = []
        for row in islice(self.waiting, rows):
            if prompts and row.prompt == prompts[-1]:
                continue
            widest = max(map(len, [*prompts, row.prompt]))
            if prompts and (self.alone or widest * (len(prompts) + 1) > PREFILL_TOKENS):
                break
            prompts.append(row.prompt)
        return prompts

    def extend(self, rows: list[Row], slots: list[int], logits_BV: Tensor) -> None:
        """Draw a token for each row from its logits; rows that end leave their slots."""
        positions = [len(row.ids) for row in rows]
        scores_BV = self.stops.forbid(logits_BV, positions)
        numbers = [row.number for row in rows]
        token_B, logprob_B = self.draws.draw(self.history(rows), scores_BV, numbers, positions)
        # One copy to the host a step; float64 holds tokens and float32 exactly.
        token, logprob = torch.stack([token_B.double(), logprob_B.double()]).tolist()
        for b, row in enumerate(rows):
            row.ids.append(int(token[b]))
            row.logprobs.append(logprob[b])
        ended = self.stops.ended([(row.prompt, row.ids) for row in rows])
        for row, slot, how in zip(rows, slots, ended, strict=True):
            if how is not None:
                own = torch.tensor(row.logprobs, dtype=torch.float32, device=logits_BV.device)
                self.answers[row.number] = Answer(row.ids, how, own)
                self.rows[slot] = None

    def history(self, rows: list[Row]) -> Tensor:
        """The tokens so far (B, T), for the repetition penalty; (B, 0) if there is none.

        Rows are filled up with their own first token, which changes no penalty.
        """
        if not self.draws.processors or self.draws.sampling.repetition_penalty == 1.0:
            return torch.empty(len(rows), 0, dtype=torch.long, device=self.forward.device)
        tokens = [row.prompt + row.ids for row in rows]
        width = max(map(len, tokens))
        filled = [own[:1] * (width - len(own)) + own for own in tokens]
        return torch.tensor(filled, device=self.forward.device)

    def close_gaps(self) -> None:
        """Move rows from the last slots to free ones, so that a step runs on the first slots."""
        while None in self.rows and any(self.rows[self.rows.index(None) :]):
            free = self.rows.index(None)
            last = max(slot for slot, row in enumerate(self.rows) if row is not None)
            row = self.rows[last]
            assert row is not None
            self.cache.move(last, free, row.cached)
            self.rows[free], self.rows[last] = row, None


def cache_width(longest_prompt: int, new_tokens: int, rows_enter: bool) -> int:
    """Number of places of a slot: a whole row, and some to spare if rows enter later."""
    return longest_prompt + new_tokens + (SLACK if rows_enter else 0)
