"""Scored -> Experience: the score and the KL penalty become rewards, advantages and returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.ops import advantages, moments
from fastppo.types import Experience, Scored

if TYPE_CHECKING:
    from fastppo.config import Config

KL_KIND = {"kl": "k1", "abs": "abs", "mse": "k2", "low_var_kl": "k3"}


@dataclass
class KLController:
    """beta, and how it follows the KL that the policy spends.

        beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon)

    KL is summed over a sequence and averaged over the batch, n is the number of sequences.
    Source: Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, section 2.2.
    """

    kl_coef: float
    target: float
    horizon: float
    adaptive: bool = True

    def update(self, kl: float, n: int) -> None:
        """Take note of a step's KL; beta changes from the next step on."""
        if self.adaptive:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.kl_coef *= 1.0 + error * n / self.horizon


@dataclass
class RunningScore:
    """Mean and standard deviation of all scores so far, the current batch included."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    @property
    def std(self) -> float:
        """Unbiased; 1 where there are not yet two different scores to tell a spread."""
        if self.count <= 1 or self.m2 <= 0:
            return 1.0
        return math.sqrt(self.m2 / (self.count - 1))

    def normalise(self, score_B: Tensor) -> Tensor:
        """Count this batch in, then centre and scale it by everything seen so far."""
        count, mean, m2 = (float(x) for x in moments(score_B.double()))
        total = self.count + count
        delta = mean - self.mean
        self.m2 += m2 + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count = total
        return (score_B - self.mean) / (self.std + 1e-8)


def shape_score(scored: Scored, config: Config, running: RunningScore) -> Tensor:
    """Normalise, then clip, then penalise: in that order, and all before the KL is added."""
    score_B = scored.score_B
    if config.ppo_score_norm:
        score_B = running.normalise(score_B)
    if config.score_clip is not None:
        score_B = score_B.clamp(-config.score_clip, config.score_clip)
    if config.missing_eos_penalty is not None:
        ended_B = torch.tensor(scored.rollout.terminated, device=score_B.device)
        score_B = torch.where(ended_B, score_B, score_B - config.missing_eos_penalty)
    return score_B


@torch.no_grad()
def estimate(
    scored: Scored, config: Config, controller: KLController, running: RunningScore
) -> Experience:
    """Advantages and returns of every response token, whitened over the whole rollout."""
    score_B = shape_score(scored, config, running)
    bootstrap_B = None
    if config.bootstrap_truncated:
        ended_B = torch.tensor(scored.rollout.terminated, device=score_B.device)
        bootstrap_B = scored.final_value_B.masked_fill(ended_B, 0.0)
    result = advantages(
        score_B,
        scored.logprob_N,
        scored.ref_logprob_N,
        scored.value_N,
        scored.offsets,
        kl_coef=controller.kl_coef,
        kl_kind=KL_KIND[config.kl_penalty],
        gamma=config.gamma,
        lam=config.lam,
        bootstrap_value_B=bootstrap_B,
        whiten_rewards=config.ppo_whiten_rewards,
        whiten_advantages=config.whiten_advantages,
    )
    return Experience(
        scored=scored,
        score_B=score_B,
        advantage_N=result.advantage_N,
        return_N=result.return_N,
        reward_N=result.reward_N,
        kl_N=result.kl_N,
        kl_coef=controller.kl_coef,
    )
