"""Operators for PPO on language models: log-probs, losses, advantages; needs only torch."""

from fastppo.ops import losses
from fastppo.ops.advantages import Advantages, advantages
from fastppo.ops.backends import Scores
from fastppo.ops.config import HeadLora, PolicyLossConfig
from fastppo.ops.dtensors import gather_weight
from fastppo.ops.gae import gae
from fastppo.ops.linear_policy_loss import linear_policy_loss
from fastppo.ops.linear_score_tokens import linear_score_tokens
from fastppo.ops.linear_token_logprobs import linear_token_logprobs
from fastppo.ops.pack import Packing, pack
from fastppo.ops.policy_loss import PolicyLoss, policy_loss
from fastppo.ops.score_tokens import score_tokens
from fastppo.ops.surrogate import PolicyMetrics
from fastppo.ops.token_kl import token_kl
from fastppo.ops.token_logprobs import TokenLogprobs, token_logprobs
from fastppo.ops.value_loss import ValueLoss, ValueMetrics, value_loss
from fastppo.ops.whiten import Moments, moments, whiten

__all__ = [
    "Advantages",
    "HeadLora",
    "Moments",
    "Packing",
    "PolicyLoss",
    "PolicyLossConfig",
    "PolicyMetrics",
    "Scores",
    "TokenLogprobs",
    "ValueLoss",
    "ValueMetrics",
    "advantages",
    "gae",
    "gather_weight",
    "linear_policy_loss",
    "linear_score_tokens",
    "linear_token_logprobs",
    "losses",
    "moments",
    "pack",
    "policy_loss",
    "score_tokens",
    "token_kl",
    "token_logprobs",
    "value_loss",
    "whiten",
]
