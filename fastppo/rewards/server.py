"""Scores by a server with LLaMA-Factory's JSON interface.

POST {"model": "model", "messages": [text, ...]}  ->  {"scores": [number, ...]}
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from fastppo.config.rewards import without_query
from fastppo.errors import UserError
from fastppo.servers.client import Client
from fastppo.types import Rollout

TOKEN = "FASTPPO_REWARD_TOKEN"
MAX_ANSWER = 1 << 20  # bytes; a score takes about 20
LARGEST = torch.finfo(torch.float32).max


class ApiReward:
    """Scores a rollout with a server; returns (B,) float32.

    The server gets prompt and response as one text, special tokens included.

    Args:
        url: the URL to POST to.
        tokenizer: the policy's, which decodes the texts.
        timeout: seconds in which an attempt must have the whole answer.
        retries: number of attempts after the first.
        batch_size: largest number of texts in a request.
    """

    def __init__(
        self, url: str, tokenizer: Any, *, timeout: float, retries: int, batch_size: int
    ) -> None:
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.key = f"reward_model: {without_query(url)}"
        self.client = Client(
            self.key,
            url,
            timeout=timeout,
            retries=retries,
            token=TOKEN,
            cure="check the server, or raise reward_api_timeout or reward_api_retries",
            largest=MAX_ANSWER,
            wanted='{"scores": [...]}',
        )

    def __call__(self, rollout: Rollout) -> Tensor:
        rows = rollout.input_ids_BT.tolist()
        ids = [row[:length] for row, length in zip(rows, rollout.lengths, strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=False)
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            scores += self.scores(texts[start : start + self.batch_size])
        return torch.tensor(scores, device=rollout.input_ids_BT.device)

    def scores(self, messages: list[str]) -> list[float]:
        """A finite number for each message; a failure that may pass is tried again."""
        answer = self.client.ask({"model": "model", "messages": messages})
        return self.parse_scores(answer, len(messages))

    def parse_scores(self, body: bytes, count: int) -> list[float]:
        """The scores in the body of an answer, which must be `count` finite numbers."""
        wanted = f'it should be {{"scores": [...]}} with {count} finite numbers'
        quote = self.client.quote
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise UserError(f"{self.key}: answers {quote(body)}, not JSON; {wanted}") from None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise UserError(f"{self.key}: answers {quote(body)} without scores; {wanted}")
        if len(scores) != count:
            raise UserError(f"{self.key}: answers {len(scores)} scores for {count}; {wanted}")
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise UserError(f"{self.key}: answers {quote(str(score))} as a score; {wanted}")
            if not abs(score) <= LARGEST:  # also refuses NaN; integers of any size compare
                raise UserError(f"{self.key}: answers {str(score)[:60]} as a score; {wanted}")
        return [float(score) for score in scores]
