"""The definitions of the operators: plain PyTorch for autograd, to be checked against the papers.

Slow, and without regard to memory: what `fastppo.ops` computes on every backend is held to these.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastppo.ops import (
    Advantages,
    HeadLora,
    PolicyLoss,
    PolicyLossConfig,
    PolicyMetrics,
    Scores,
    TokenLogprobs,
    ValueLoss,
    ValueMetrics,
)

IGNORE_INDEX = -100
EPS = 1e-8  # of whitening, inside the root


def stat_dtype(*tensors: Tensor) -> torch.dtype:
    """Float64 where an input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def between(x: Tensor, low: float, high: float) -> Tensor:
    """torch.clamp with the gradient at a bound itself, which torch 2.14's does not pass."""
    return torch.where((x < low) | (x > high), x.detach().clamp(low, high), x)


def token_kl_reference(
    logprob_N: Tensor,
    ref_logprob_N: Tensor,
    *,
    kind: str = "k1",
    log_ratio_limit: float = 20.0,
) -> Tensor:
    """The definition of `token_kl`, for autograd."""
    masked = logprob_N == float("-inf")
    diff = torch.where(masked, 0, logprob_N) - torch.where(masked, 0, ref_logprob_N)
    if kind == "k1":
        return diff
    if kind == "abs":
        return diff.abs()
    if kind == "k2":
        return diff**2 / 2
    e = between(-diff, -log_ratio_limit, log_ratio_limit)
    return e.exp() - 1 - e


def gae_reference(
    reward_N: Tensor,
    value_N: Tensor,
    offsets: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_value_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `gae`: A_t as the sum of (gamma lam)^l delta_{t+l}, in O(T^2)."""
    advantage_N = torch.zeros_like(reward_N)
    bounds = offsets.tolist()
    for b, (start, end) in enumerate(pairwise(bounds)):
        after = 0.0 if bootstrap_value_B is None else bootstrap_value_B[b]
        for t in range(start, end):
            for k in range(t, end):
                following = value_N[k + 1] if k + 1 < end else after
                delta = reward_N[k] + gamma * following - value_N[k]
                advantage_N[t] += (gamma * lam) ** (k - t) * delta
    return advantage_N, advantage_N + value_N


def whiten_reference(
    x_N: Tensor, *, weight_N: Tensor | None = None, shift_mean: bool = True
) -> Tensor:
    """The definition of `whiten`: the live values alone, by torch's own mean and variance."""
    live_N = torch.ones_like(x_N, dtype=torch.bool) if weight_N is None else weight_N != 0
    live = x_N[live_N]
    y_N = torch.zeros_like(x_N)
    if live.numel():
        variance = live.var() if live.numel() > 1 else torch.zeros((), dtype=x_N.dtype)
        y = (live - live.mean()) / (variance + EPS).sqrt()
        y_N[live_N] = y if shift_mean else y + live.mean()
    return y_N


def advantages_reference(
    score_B: Tensor,
    logprob_N: Tensor,
    ref_logprob_N: Tensor,
    value_N: Tensor,
    offsets: Tensor,
    *,
    kl_coef: float | Tensor,
    kl_kind: str = "k1",
    kl_N: Tensor | None = None,
    extra_reward_N: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_value_B: Tensor | None = None,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
) -> Advantages:
    """The definition of `advantages`, sequence by sequence."""
    kl = token_kl_reference(logprob_N, ref_logprob_N, kind=kl_kind) if kl_N is None else kl_N
    reward = -kl_coef * kl if extra_reward_N is None else -kl_coef * kl + extra_reward_N
    for b, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            reward[end - 1] = reward[end - 1] + score_B[b]
    if whiten_rewards:
        reward = whiten_reference(reward, shift_mean=False)
    advantage, returns = gae_reference(
        reward, value_N, offsets, gamma=gamma, lam=lam, bootstrap_value_B=bootstrap_value_B
    )
    if whiten_advantages:
        advantage = whiten_reference(advantage)
    return Advantages(advantage, returns, reward, kl)


def value_loss_reference(
    value_N: Tensor,
    old_value_N: Tensor,
    return_N: Tensor,
    weight_N: Tensor,
    *,
    clip: float | None = 0.2,
) -> ValueLoss:
    """The definition of `value_loss`, live tokens one by one."""
    zero = value_N.new_zeros(())
    loss = zero + 0.0 * value_N.nan_to_num().sum()
    sums = [zero] * len(ValueMetrics._fields)
    for i in range(value_N.numel()):
        if weight_N[i] == 0:
            continue
        v, old, goal = value_N[i], old_value_N[i], return_N[i]
        error = (v - goal) ** 2
        held = error if clip is None else (v.clamp(old - clip, old + clip) - goal) ** 2
        loss = loss + weight_N[i] * torch.max(error, held) / 2
        parts = (zero + 1, (held > error).to(v.dtype), error.detach(), v.detach(), goal, goal**2)
        sums = [a + b for a, b in zip(sums, parts, strict=True)]
    return ValueLoss(loss, ValueMetrics.of(sums))


def log_probs_reference(
    logits_NV: Tensor, live_N: Tensor, temperature: float | Tensor, softcap: float | None
) -> Tensor:
    """log softmax of the bent and tempered logits, in the statistics' dtype."""
    x = torch.where(live_N[:, None], logits_NV, 0).to(stat_dtype(logits_NV))
    masked = x == float("-inf")
    if softcap is not None:
        x = softcap * torch.tanh(torch.where(masked, 0, x) / softcap)
    tau = temperature
    if isinstance(tau, Tensor) and tau.ndim == 1:
        tau = torch.where(live_N, tau, 1)[:, None]
    z = torch.where(masked, float("-inf"), torch.where(masked, 0, x) / tau)
    return z.log_softmax(-1)


def token_logprobs_reference(
    logits_NV: Tensor,
    token_N: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> TokenLogprobs:
    """The definition of `token_logprobs`, for autograd."""
    live = token_N != ignore_index
    log_p = log_probs_reference(logits_NV, live, temperature, softcap)
    logprob = log_p.gather(1, torch.where(live, token_N, 0).long()[:, None]).squeeze(1)
    possible = log_p > float("-inf")
    finite = torch.where(possible, log_p, 0)
    entropy = -torch.where(possible, log_p.exp() * finite, 0).sum(-1)
    return TokenLogprobs(torch.where(live, logprob, 0), torch.where(live, entropy, 0))


def policy_loss_reference(
    logits_NV: Tensor,
    token_N: Tensor,
    behaviour_logprob_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    *,
    ref_logprob_N: Tensor | None = None,
    importance_weight_N: Tensor | None = None,
    offsets: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    kl_coef: float | Tensor | None = None,
    entropy_coef: float | Tensor | None = None,
    config: PolicyLossConfig | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> PolicyLoss:
    """The definition of `policy_loss`, for autograd: every derivative is torch's own."""
    config = PolicyLossConfig() if config is None else config
    beta = config.kl_coef if kl_coef is None else kl_coef
    bonus = config.entropy_coef if entropy_coef is None else entropy_coef
    live = (weight_N != 0) & (token_N != ignore_index)
    index = live.nonzero().squeeze(1)
    tau = temperature
    if isinstance(tau, Tensor) and tau.ndim == 1:
        tau = tau[index]
    all_live = torch.ones_like(index, dtype=torch.bool)
    log_p = log_probs_reference(logits_NV[index], all_live, tau, softcap)
    logprob = log_p.gather(1, token_N[index].long()[:, None]).squeeze(1)
    possible = log_p > float("-inf")
    entropy = -torch.where(possible, log_p.exp() * torch.where(possible, log_p, 0), 0).sum(-1)

    masked = logprob == float("-inf")
    limit = config.log_ratio_limit
    raw = torch.where(masked, -limit, torch.where(masked, 0, logprob) - behaviour_logprob_N[index])
    used = raw
    if config.ratio_level == "sequence":
        assert offsets is not None
        bounds = offsets.tolist()
        used = raw.clone()
        for start, end in pairwise(bounds):
            mine = (index >= start) & (index < end)
            if mine.any():
                dead = bool(masked[mine].any())
                mean = raw[mine].detach() if dead else raw[mine]
                used = torch.where(mine, float("-inf") if dead else mean.mean(), used)
        masked = used == float("-inf")
    ratio = torch.where(masked, 0, between(torch.where(masked, 0, used), -limit, limit).exp())
    advantage = advantage_N[index]
    clipped = between(ratio, 1 - config.clip_low, 1 + config.clip_high)
    surrogate = torch.maximum(-advantage * ratio, -advantage * clipped)
    if config.dual_clip is not None:
        bound = -config.dual_clip * advantage
        surrogate = torch.where((advantage < 0) & (surrogate > bound), bound, surrogate)
    if importance_weight_N is not None:
        surrogate = surrogate * importance_weight_N[index]
    weight = weight_N[index]
    loss = (weight * surrogate).sum()
    kl = torch.zeros_like(logprob)
    if ref_logprob_N is not None:
        kl = token_kl_reference(
            logprob, ref_logprob_N[index], kind=config.kl_kind, log_ratio_limit=limit
        )
        loss = loss + (weight * beta * kl).sum()
    sampled = logprob > float("-inf")
    loss = loss - (weight * bonus * torch.where(sampled, entropy, 0)).sum()

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(token_N.numel()).index_copy(0, index, x.detach())

    filler = torch.zeros(len(PolicyMetrics._fields), dtype=loss.dtype)
    return PolicyLoss(loss, spread(logprob), spread(entropy), spread(kl), PolicyMetrics(filler))


def score_tokens_reference(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    token_N: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Scores:
    """The definition of `score_tokens`."""
    live = token_N != ignore_index
    index = torch.where(live, token_N, 0).long()[:, None]
    log_p = log_probs_reference(logits_NV, live, temperature, softcap)
    log_q = log_probs_reference(ref_logits_NV, live, temperature, softcap)
    possible = log_p > float("-inf")
    p = log_p.exp()
    entropy = -torch.where(possible, p * torch.where(possible, log_p, 0), 0).sum(-1)
    allowed = log_q > float("-inf")
    log_ratio = torch.where(possible, log_p, 0) - torch.where(allowed, log_q, 0)
    kl = torch.where(possible, p * log_ratio, 0).sum(-1)
    kl = torch.where((possible & ~allowed).any(-1), float("inf"), kl)
    results = (log_p.gather(1, index).squeeze(1), log_q.gather(1, index).squeeze(1), entropy, kl)
    return Scores(*(torch.where(live, x, 0) for x in results))


def dense_logits(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head_lora: HeadLora | None
) -> Tensor:
    """All logits at once: the definition that the linear ops never follow."""
    logits_NV = hidden_ND @ weight_VD.T
    if bias_V is not None:
        logits_NV = logits_NV + bias_V
    if head_lora is not None:
        low_NR = hidden_ND @ head_lora.A_RD.T
        logits_NV = logits_NV + head_lora.scaling * (low_NR @ head_lora.B_VR.T)
    return logits_NV


def linear_token_logprobs_reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    token_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    head_lora: HeadLora | None = None,
    entropy_grad: bool = False,
    **keywords: Any,
) -> TokenLogprobs:
    """The definition of `linear_token_logprobs`, for autograd."""
    logits_NV = dense_logits(hidden_ND, weight_VD, bias_V, head_lora)
    found = token_logprobs_reference(logits_NV, token_N, **keywords)
    return found if entropy_grad else found._replace(entropy_N=found.entropy_N.detach())


def linear_policy_loss_reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    token_N: Tensor,
    behaviour_logprob_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    head_lora: HeadLora | None = None,
    **keywords: Any,
) -> PolicyLoss:
    """The definition of `linear_policy_loss`, for autograd."""
    logits_NV = dense_logits(hidden_ND, weight_VD, bias_V, head_lora)
    return policy_loss_reference(
        logits_NV, token_N, behaviour_logprob_N, advantage_N, weight_N, **keywords
    )


def linear_score_tokens_reference(
    hidden_ND: Tensor,
    ref_hidden_ND: Tensor,
    weight_VD: Tensor,
    token_N: Tensor,
    *,
    ref_weight_VD: Tensor | None = None,
    bias_V: Tensor | None = None,
    head_lora: HeadLora | None = None,
    ref_head_lora: HeadLora | None = None,
    **keywords: Any,
) -> Scores:
    """The definition of `linear_score_tokens`."""
    ref_weight_VD = weight_VD if ref_weight_VD is None else ref_weight_VD
    return score_tokens_reference(
        dense_logits(hidden_ND, weight_VD, bias_V, head_lora),
        dense_logits(ref_hidden_ND, ref_weight_VD, bias_V, ref_head_lora),
        token_N,
        **keywords,
    )
