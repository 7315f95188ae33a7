"""The operators that choose a backend, by name: what `python -m fastppo.info` lists."""

from __future__ import annotations

from typing import Final

OPS: Final = (
    "token_kl",
    "gae",
    "whiten",
    "advantages",
    "token_logprobs",
    "linear_token_logprobs",
    "policy_loss",
    "linear_policy_loss",
    "score_tokens",
    "linear_score_tokens",
    "value_loss",
)
