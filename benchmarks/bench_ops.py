"""Every operator of the registry against eager PyTorch, forward and backward.

    pytest benchmarks/bench_ops.py --benchmark-only --benchmark-group-by=group

Eager is what a trainer writes, not the definition that the tests compare with: that one masks and
copies more. The answer is checked before anything is timed. Sizes come from FASTPPO_BENCH_N, _V
and _D.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo.ops import PolicyLoss, PolicyMetrics, Scores
from fastppo.ops.registry import OPS, Op, Shape

SHAPE = Shape(
    n=int(os.environ.get("FASTPPO_BENCH_N", "128")),
    vocab=int(os.environ.get("FASTPPO_BENCH_V", "8192")),
    hidden=int(os.environ.get("FASTPPO_BENCH_D", "256")),
    batch=8,
)


def processor() -> str:
    """The CPU by name."""
    info = Path("/proc/cpuinfo")  # Linux alone has it
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def eager_gae(
    reward_N: Tensor, value_N: Tensor, offsets: Tensor, gamma: float, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """The loop over time that trainers have, on a padded batch of one length."""
    batch = offsets.numel() - 1
    reward_BT, value_BT = reward_N.view(batch, -1), value_N.view(batch, -1)
    carry, columns = torch.zeros(batch), []
    for t in reversed(range(reward_BT.shape[1])):
        last = t + 1 == reward_BT.shape[1]
        following = torch.zeros(batch) if last else value_BT[:, t + 1]
        carry = reward_BT[:, t] + gamma * following - value_BT[:, t] + gamma * lam * carry
        columns.append(carry)
    advantage_N = torch.stack(columns[::-1], dim=1).flatten()
    return advantage_N, advantage_N + value_N


def eager_advantages(
    score_B: Tensor,
    logprob_N: Tensor,
    ref_logprob_N: Tensor,
    value_N: Tensor,
    offsets: Tensor,
    kl_coef: float,
) -> tuple[Tensor, ...]:
    """KL reward, the loop, and whitening."""
    kl_N = logprob_N - ref_logprob_N
    reward_BT = (-kl_coef * kl_N).view(offsets.numel() - 1, -1)
    reward_BT[:, -1] += score_B
    reward_N = reward_BT.flatten()
    advantage_N, return_N = eager_gae(reward_N, value_N, offsets, 1.0)
    whitened_N = (advantage_N - advantage_N.mean()) * torch.rsqrt(advantage_N.var() + 1e-8)
    return whitened_N, return_N, reward_N, kl_N


def eager_value_loss(
    value_N: Tensor, old_value_N: Tensor, return_N: Tensor, weight_N: Tensor
) -> Tensor:
    """TRL's two lines."""
    held_N = torch.clamp(value_N, old_value_N - 0.2, old_value_N + 0.2)
    worst_N = torch.max((value_N - return_N) ** 2, (held_N - return_N) ** 2)
    return (weight_N * worst_N).sum() / 2


def eager_token_logprobs(logits_NV: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
    """One log-softmax, a gather and a sum."""
    log_p_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    logprob_N = log_p_NV.gather(1, token_N[:, None]).squeeze(1)
    return logprob_N, -(log_p_NV.exp() * log_p_NV).sum(-1)


def eager_policy_loss(
    logits_NV: Tensor,
    token_N: Tensor,
    behaviour_logprob_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    ref_logprob_N: Tensor,
    kl_coef: float,
    entropy_coef: float,
) -> PolicyLoss:
    """What trainers write after the model's forward, with autograd for the rest."""
    logprob_N, entropy_N = eager_token_logprobs(logits_NV, token_N)
    ratio_N = (logprob_N - behaviour_logprob_N).exp()
    worst_N = torch.max(-advantage_N * ratio_N, -advantage_N * ratio_N.clamp(0.8, 1.2))
    away_N = ref_logprob_N - logprob_N
    kl_N = away_N.exp() - 1 - away_N
    loss = (weight_N * (worst_N + kl_coef * kl_N - entropy_coef * entropy_N)).sum()
    ratio_N = ratio_N.detach()
    zero = ratio_N.new_zeros(())
    metrics = PolicyMetrics(*[zero] * len(PolicyMetrics._fields))._replace(
        ratio_sum=ratio_N.sum(), clipped_sum=((ratio_N - 1).abs() > 0.2).sum()
    )
    return PolicyLoss(loss, logprob_N.detach(), entropy_N.detach(), kl_N.detach(), metrics)


def eager_score_tokens(logits_NV: Tensor, ref_logits_NV: Tensor, token_N: Tensor) -> Scores:
    """Two log-softmaxes and three sums."""
    with torch.no_grad():
        log_p_NV = torch.log_softmax(logits_NV.float(), dim=-1)
        log_q_NV = torch.log_softmax(ref_logits_NV.float(), dim=-1)
        p_NV, at_N1 = log_p_NV.exp(), token_N[:, None]
        return Scores(
            log_p_NV.gather(1, at_N1).squeeze(1),
            log_q_NV.gather(1, at_N1).squeeze(1),
            -(p_NV * log_p_NV).sum(-1),
            (p_NV * (log_p_NV - log_q_NV)).sum(-1),
        )


def eager_linear_token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, token_N: Tensor
) -> tuple[Tensor, Tensor]:
    """All logits at once."""
    return eager_token_logprobs(hidden_ND @ weight_VD.T, token_N)


def eager_linear_policy_loss(
    hidden_ND: Tensor, weight_VD: Tensor, token_N: Tensor, *rest: Any, **keywords: Any
) -> PolicyLoss:
    """All logits at once."""
    return eager_policy_loss(hidden_ND @ weight_VD.T, token_N, *rest, **keywords)


def eager_linear_score_tokens(
    hidden_ND: Tensor, ref_hidden_ND: Tensor, weight_VD: Tensor, token_N: Tensor
) -> Scores:
    """All logits of both policies at once."""
    return eager_score_tokens(hidden_ND @ weight_VD.T, ref_hidden_ND @ weight_VD.T, token_N)


EAGER: dict[str, Callable[..., Any]] = {
    "token_logprobs": eager_token_logprobs,
    "policy_loss": eager_policy_loss,
    "score_tokens": eager_score_tokens,
    "linear_token_logprobs": eager_linear_token_logprobs,
    "linear_policy_loss": eager_linear_policy_loss,
    "linear_score_tokens": eager_linear_score_tokens,
    "gae": eager_gae,
    "advantages": eager_advantages,
    "value_loss": eager_value_loss,
}


def loss_of(op: Op, result: Any) -> Tensor:
    """What backward is called on."""
    if isinstance(result, Tensor):
        return result.sum()
    return getattr(result, op.loss) if op.loss else sum(x.sum() for x in result if x.requires_grad)


def step(op: Op, function: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
    """Forward, and backward where there is one; all that came out."""
    for name in op.differentiable:
        inputs[name].grad = None
    result = function(**inputs)
    if op.differentiable:
        loss = loss_of(op, result)
        loss.backward()
        return [loss.detach(), *(inputs[name].grad for name in op.differentiable)]
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("contender", ["fastppo", "eager"])
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def bench(benchmark: Any, op: Op, contender: str) -> None:
    """One operator, one contender."""
    inputs = op.make_inputs(SHAPE, torch.float32, 0)
    for name in op.differentiable:
        inputs[name].requires_grad_()
    eager = EAGER.get(op.name, op.reference)
    want = [x.clone() for x in step(op, eager, inputs)]
    for a, b in zip(step(op, op.function, inputs), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    benchmark.group = op.name
    benchmark.extra_info.update(
        shape=str(SHAPE),
        bytes=op.bytes_moved(SHAPE, torch.float32),
        flops=op.flops(SHAPE),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        cpu=processor(),
    )
    function = op.function if contender == "fastppo" else eager
    benchmark.pedantic(step, args=(op, function, inputs), rounds=15, warmup_rounds=2)
