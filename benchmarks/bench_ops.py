"""Every operator of the registry against eager PyTorch, forward and backward.

    pytest benchmarks/bench_ops.py --benchmark-only --benchmark-group-by=group

The answer is checked before anything is timed. Sizes come from FASTPPO_BENCH_N, _V and _D.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastppo.ops
from fastppo.ops.registry import OPS, Op, Shape

assert fastppo.ops.__all__  # importing the package is what fills the registry
SHAPE = Shape(
    n=int(os.environ.get("FASTPPO_BENCH_N", "128")),
    vocab=int(os.environ.get("FASTPPO_BENCH_V", "8192")),
    hidden=int(os.environ.get("FASTPPO_BENCH_D", "256")),
    batch=8,
)


def processor() -> str:
    """The CPU by name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


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


EAGER: dict[str, Callable[..., Any]] = {
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
        loss_of(op, result).backward()
        return [inputs[name].grad for name in op.differentiable]
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
