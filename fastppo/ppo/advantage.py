"""Scored -> Experience: rewards from scores and KL penalty, then advantages and returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.config.ppo import KL_KIND
from fastppo.ops import advantages, losses, moments, whiten
from fastppo.types import Experience, Scored

if TYPE_CHECKING:
    from fastppo.config import Config


@dataclass
class KLController:
    """The KL coefficient beta (`kl_coef`), which adapts to the measured KL.

        beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * min(n, horizon) / horizon)

    KL is summed over a sequence and averaged over the batch; n is the number of sequences. For
    n <= horizon this is the published rule. For larger n the published rule has no `min`, so its
    factor becomes negative from n = 5 horizon on. A step measures the KL once, so here one step
    changes beta by 20% at most: the factor is in [0.8, 1.2] for any n.

    Source: Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, section 2.2.
    """

    kl_coef: float
    target: float
    horizon: float
    adaptive: bool = True

    def update(self, kl: float, n: int) -> None:
        """Adapt beta to the KL of a step with n sequences; a KL that is not finite is ignored."""
        if self.adaptive and math.isfinite(kl):
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.kl_coef *= 1.0 + error * min(n, self.horizon) / self.horizon


@dataclass
class RunningScore:
    """Running mean and standard deviation of all scores of a run."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 1 until two different scores have been seen."""
        if self.count <= 1 or self.m2 <= 0:
            return 1.0
        return math.sqrt(self.m2 / (self.count - 1))

    def normalise(self, score_B: Tensor, *, centre: bool = True) -> Tensor:
        """Add a batch to the statistics, then scale it (and with `centre` shift it) by them."""
        count, mean, m2 = (float(x) for x in moments(score_B.double()))
        total = self.count + count
        delta = mean - self.mean
        self.m2 += m2 + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count = total
        return (score_B - (self.mean if centre else 0.0)) / (self.std + 1e-8)


def overlong_penalty(
    length_B: Tensor, *, max_new_tokens: int, buffer_len: int, factor: float
) -> Tensor:
    """What each response's score loses for ending in the last `buffer_len` tokens, float64 (B,).

        factor * clip(length - (max_new_tokens - buffer_len), 0, buffer_len) / buffer_len

    Args:
        length_B: int64 (B,), tokens of each response, EOS included.

    Source: Yu et al. 2025, DAPO, eq. 13; `apply_overlong_penalty` of OpenRLHF.
    """
    into_B = (length_B - (max_new_tokens - buffer_len)).clamp(0, buffer_len)
    return factor * into_B.double() / buffer_len


def shape_score(scored: Scored, config: Config, running: RunningScore) -> Tensor:
    """Scores (B,) after normalisation, clipping and penalties, in that order."""
    score_B, rollout = scored.score_B, scored.rollout
    if config.ppo_score_norm or config.use_score_scaling:
        centre = config.ppo_score_norm or config.use_score_norm
        score_B = running.normalise(score_B, centre=centre)
    if config.score_clip is not None:
        score_B = score_B.clamp(-config.score_clip, config.score_clip)
    ended_B = torch.tensor(rollout.terminated, device=score_B.device)
    if config.bootstrap_truncated:
        # The bootstrapped value predicts the score: with both, the response would be paid twice.
        score_B = score_B.masked_fill(~ended_B, 0.0)
    if config.missing_eos_penalty is not None:
        score_B = torch.where(ended_B, score_B, score_B - config.missing_eos_penalty)
    length_B = torch.tensor(rollout.response_lengths, device=score_B.device)
    if config.overlong_buffer_len is not None:
        score_B = score_B - overlong_penalty(
            length_B,
            max_new_tokens=config.max_new_tokens,
            buffer_len=config.overlong_buffer_len,
            factor=config.overlong_penalty_factor,
        ).to(score_B.dtype)
    refused_B = length_B < config.min_response_length
    if config.penalise_no_eos:
        refused_B = refused_B | ~ended_B
    return score_B.masked_fill(refused_B, config.reward_penalty)


@torch.no_grad()
def estimate(
    scored: Scored, config: Config, controller: KLController, running: RunningScore
) -> Experience:
    """Advantages and returns of every response token; whitening uses all tokens that train.

    Without a critic the values are 0, so a token's return is the sum of the rewards from that token
    on. reinforce++ uses that return as the advantage; grpo and rloo compare the returns of whole
    responses.
    """
    score_B, left_out = shape_score(scored, config, running), rows_left_out(scored, config)
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
        whiten_advantages=config.whitens_advantages and not (by_response or left_out),
    )
    advantage_N = result.advantage_N
    if by_response:
        advantage_B = losses.group_advantages(
            result.return_N[scored.offsets[:-1].long()],
            config.num_generations,
            kind=config.advantage,
            scale=config.scale_rewards,
        )
        advantage_N = advantage_B.repeat_interleave(
            scored.offsets.diff(), output_size=advantage_N.numel()
        )
    if config.whitens_advantages and (by_response or left_out):
        advantage_N = whiten(advantage_N, weight_N=live_tokens(scored, left_out))
    importance_N = None
    if config.importance_mode is not None:
        lower, upper = config.importance_bounds
        importance_N = losses.importance_weights(
            scored.logprob_N,
            scored.rollout.sampler_logprob_N,
            mode=config.importance_mode,
            lower=lower,
            upper=upper,
            offsets=scored.offsets,
        )
    return Experience(
        scored=scored,
        score_B=score_B,
        advantage_N=advantage_N,
        return_N=result.return_N,
        reward_N=result.reward_N,
        kl_N=result.kl_N,
        kl_coef=controller.kl_coef,
        importance_weight_N=importance_N,
        left_out=left_out,
    )


def rows_left_out(scored: Scored, config: Config) -> frozenset[int]:
    """Rows that no loss is computed on: with `mask_truncated_completions` the truncated ones.

    They are all rows if `filter_groups` found no group whose scores differ.
    """
    sampled = scored.rollout.filtered_from
    if sampled is not None and not sampled.kept:
        return frozenset(range(len(scored.rollout.terminated)))
    if not config.mask_truncated_completions:
        return frozenset()
    return frozenset(row for row, ended in enumerate(scored.rollout.terminated) if not ended)


def live_tokens(scored: Scored, left_out: frozenset[int]) -> Tensor | None:
    """Which tokens are of rows that are not left out, bool (N,); None if all are."""
    if not left_out:
        return None
    live = [row not in left_out for row in range(len(scored.rollout.terminated))]
    live_B = torch.tensor(live, device=scored.offsets.device)
    return live_B.repeat_interleave(scored.offsets.diff(), output_size=scored.logprob_N.numel())
