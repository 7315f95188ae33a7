"""A finished PPO step as the row that `training_metrics.csv` keeps of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.rewards.reward import mean_score
from fastppo.types import Experience

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.ppo.state import State
    from fastppo.run.console import Clock


def correlation(x_B: Tensor, y_B: Tensor) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    x_B, y_B = x_B.double() - x_B.double().mean(), y_B.double() - y_B.double().mean()
    scale = (x_B.square().sum() * y_B.square().sum()).sqrt().item()
    return (x_B * y_B).sum().item() / scale if scale > 0 else 0.0


def spread(x: Tensor) -> float:
    """Standard deviation, unbiased; 0 for fewer than two values."""
    return x.std().item() if x.numel() > 1 else 0.0


def explained_variance(value_N: Tensor, return_N: Tensor) -> float:
    """1 - var(return - value) / var(return); 0 where the returns do not vary."""
    variance = return_N.var(correction=0).item()
    return 1.0 - (return_N - value_N).var(correction=0).item() / variance if variance > 0 else 0.0


def critic_columns(experience: Experience, rates: dict[str, float]) -> dict[str, float]:
    """What the critic knew at rollout; nothing where there is none."""
    value_N = experience.scored.value_N
    if value_N is None:
        return {}
    return {
        "explained_variance": explained_variance(value_N, experience.return_N),
        "value_mean": value_N.mean().item(),
        "value_std": spread(value_N),
        "critic_learning_rate": rates["critic"],
        "grad_norm_critic": 0.0,
    }


def sampler_columns(experience: Experience, config: Config) -> dict[str, float]:
    """How far the truncated importance weights are from 1; nothing where they are off."""
    weight_N = experience.importance_weight_N
    if weight_N is None:
        return {}
    # exp(log(threshold)) is not threshold to the bit.
    capped_N = weight_N >= config.rollout_is_threshold * (1 - 1e-6)
    return {
        "rollout_is_mean": weight_N.mean().item(),
        "rollout_is_capped": capped_N.float().mean().item(),
    }


def step_row(
    state: State, experience: Experience, learned: dict[str, float], clock: Clock
) -> dict[str, float]:
    """Every column of the step, by the names of `fastppo.ppo.metrics.COLUMNS`."""
    scored, config = experience.scored, state.config
    rollout = scored.rollout
    sequences = len(rollout.prompts)
    length_B = torch.tensor(rollout.response_lengths, device=scored.score_B.device).float()
    gap_N = rollout.sampler_logprob_N - scored.logprob_N
    # The first group of a role; with LoRA+ its second has a rate that is a multiple of that.
    rates = {group["role"]: group["lr"] for group in reversed(state.optimizer.param_groups)}
    parts = {name: mean_score(scored.reward_parts[name]) for name in state.reward.extra_names}
    return {
        "step": state.step,
        "epoch": state.step * config.prompts_a_step / len(state.prompts),
        "score": scored.score_B.mean().item(),
        "score_std": spread(scored.score_B),
        **{f"reward/{name}": mean for name, mean in parts.items() if mean is not None},
        "score_shaped": experience.score_B.mean().item(),
        "kl": (scored.logprob_N - scored.ref_logprob_N).sum().item() / sequences,
        "kl_controlled": experience.kl_N.sum().item() / sequences,
        "kl_target": config.ppo_target,
        "kl_coef": experience.kl_coef,
        "entropy": scored.entropy_N.mean().item(),
        "return_mean": experience.return_N.mean().item(),
        "return_std": spread(experience.return_N),
        "sampler_gap": gap_N.mean().item(),
        "sampler_gap_abs": gap_N.abs().mean().item(),
        "response_length": length_B.mean().item(),
        "response_length_max": length_B.max().item(),
        "eos_share": sum(rollout.terminated) / sequences,
        "score_length_corr": correlation(scored.score_B, length_B),
        "learning_rate": rates["actor"],
        "response_tokens": sum(rollout.response_lengths),
        "grad_norm_actor": 0.0,  # unless it learned
        **critic_columns(experience, rates),
        **sampler_columns(experience, config),
        **({"ptx_loss": 0.0} if state.ptx is not None else {}),
        **learned,
        **clock.step_columns(sum(rollout.response_lengths), learned["update_tokens"]),
    }
