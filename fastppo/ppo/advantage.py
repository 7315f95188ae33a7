"""Scored -> Experience: the score and the KL penalty become rewards, advantages and returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.config.ppo import KL_KIND
from fastppo.ops import advantages, moments, whiten
from fastppo.types import Experience, Scored

if TYPE_CHECKING:
    from fastppo.config import Config

GROUP_EPS = 1e-4  # beside the standard deviation, as in TRL


@dataclass
class KLController:
    """beta, and how it follows the KL that the policy spends.

        beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * min(n, horizon) / horizon)

    KL is summed over a sequence and averaged over the batch, n is the number of sequences. Up to
    n = horizon that is the published rule, number for number. Past it the published factor goes on
    falling with n, and below 0 from n = 5 horizon; a step is one measurement of the KL, and here
    one measurement moves beta by 20% at most, so that the factor is in [0.8, 1.2] for any n.

    Source: Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, section 2.2.
    """

    kl_coef: float
    target: float
    horizon: float
    adaptive: bool = True

    def update(self, kl: float, n: int) -> None:
        """Take note of a step's KL; beta changes from the next step on. NaN says nothing."""
        if self.adaptive and math.isfinite(kl):
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.kl_coef *= 1.0 + error * min(n, self.horizon) / self.horizon


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

    def normalise(self, score_B: Tensor, *, centre: bool = True) -> Tensor:
        """Count this batch in, then (centre and) scale it by everything seen so far."""
        count, mean, m2 = (float(x) for x in moments(score_B.double()))
        total = self.count + count
        delta = mean - self.mean
        self.m2 += m2 + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count = total
        return (score_B - (self.mean if centre else 0.0)) / (self.std + 1e-8)


def shape_score(scored: Scored, config: Config, running: RunningScore) -> Tensor:
    """Normalise, then clip, then penalise: in that order, and all before the KL is added."""
    score_B, rollout = scored.score_B, scored.rollout
    if config.ppo_score_norm or config.use_score_scaling:
        centre = config.ppo_score_norm or config.use_score_norm
        score_B = running.normalise(score_B, centre=centre)
    if config.score_clip is not None:
        score_B = score_B.clamp(-config.score_clip, config.score_clip)
    ended_B = torch.tensor(rollout.terminated, device=score_B.device)
    if config.bootstrap_truncated:
        # The value that such a response goes on with predicts its score: both would pay it twice.
        score_B = score_B.masked_fill(~ended_B, 0.0)
    if config.missing_eos_penalty is not None:
        score_B = torch.where(ended_B, score_B, score_B - config.missing_eos_penalty)
    length_B = torch.tensor(rollout.response_lengths, device=score_B.device)
    refused_B = length_B < config.min_response_length
    if config.penalise_no_eos:
        refused_B = refused_B | ~ended_B
    return score_B.masked_fill(refused_B, config.reward_penalty)


def group_advantages(return_B: Tensor, config: Config) -> Tensor:
    r"""One advantage a response (B,): its return against those of the same prompt's n responses.

        rloo: A_i = R_i - mean of the other n - 1
        grpo: A_i = (R_i - mean) / (std + 1e-4),    std of the n, of the whole batch, or left out

    Source: Ahmadian et al. 2024, arXiv 2402.14740 (RLOO); Shao et al. 2024, arXiv 2402.03300
    (GRPO); Liu et al. 2025, arXiv 2503.20783 (without std).
    """
    n = config.num_generations
    return_Gn = return_B.view(-1, n)
    centred_Gn = return_Gn - return_Gn.mean(1, keepdim=True)
    if config.advantage == "rloo":
        return (centred_Gn * n / (n - 1)).flatten()
    if config.scale_rewards == "group":
        centred_Gn = centred_Gn / (return_Gn.std(1, keepdim=True) + GROUP_EPS)
    elif config.scale_rewards == "batch":
        centred_Gn = centred_Gn / (return_B.std() + GROUP_EPS)
    return centred_Gn.flatten()


def importance_weights(scored: Scored, threshold: float) -> Tensor:
    r"""min(pi_behaviour / pi_sampler, threshold) of each token (N,): truncated importance sampling.

    The policy as the trainer computes it against the distribution that the token was drawn from.

    Source: Ionides 2008, Truncated Importance Sampling.
    """
    log_ratio_N = scored.logprob_N - scored.rollout.sampler_logprob_N
    return log_ratio_N.clamp(max=math.log(threshold)).exp()


@torch.no_grad()
def estimate(
    scored: Scored, config: Config, controller: KLController, running: RunningScore
) -> Experience:
    """Advantages and returns of every response token; what is whitened is so over the rollout.

    Without a critic the values are 0, so that the return of a token is the sum of the rewards from
    there on: reinforce++ takes that for its advantage, grpo and rloo compare that of whole
    responses.
    """
    score_B = shape_score(scored, config, running)
    by_response = config.advantage in ("grpo", "rloo")
    value_N, bootstrap_B = scored.value_N, None
    if value_N is None:
        value_N = torch.zeros_like(scored.logprob_N)
    if config.bootstrap_truncated:
        assert scored.final_value_B is not None
        ended_B = torch.tensor(scored.rollout.terminated, device=score_B.device)
        bootstrap_B = scored.final_value_B.masked_fill(ended_B, 0.0)
    result = advantages(
        score_B,
        scored.logprob_N,
        scored.ref_logprob_N,
        value_N,
        scored.offsets,
        kl_coef=0.0 if config.use_kl_loss else controller.kl_coef,
        kl_kind=KL_KIND[config.kl_penalty],
        kl_N=scored.exact_kl_N,
        gamma=config.gamma,
        lam=config.lam if config.has_critic else 1.0,
        bootstrap_value_B=bootstrap_B,
        whiten_rewards=config.ppo_whiten_rewards,
        whiten_advantages=config.whitens_advantages and not by_response,
    )
    advantage_N = result.advantage_N
    if by_response:
        advantage_B = group_advantages(result.return_N[scored.offsets[:-1].long()], config)
        advantage_N = advantage_B.repeat_interleave(
            scored.offsets.diff(), output_size=advantage_N.numel()
        )
        advantage_N = whiten(advantage_N) if config.whitens_advantages else advantage_N
    threshold = config.rollout_is_threshold
    return Experience(
        scored=scored,
        score_B=score_B,
        advantage_N=advantage_N,
        return_N=result.return_N,
        reward_N=result.reward_N,
        kl_N=result.kl_N,
        kl_coef=controller.kl_coef,
        importance_weight_N=None if threshold is None else importance_weights(scored, threshold),
    )
