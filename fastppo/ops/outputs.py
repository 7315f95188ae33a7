"""What the kernels over rows of logits write besides gradients, whichever language they are in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fastppo.ops.surrogate import PolicyMetrics

TERMS: Final = len(PolicyMetrics._fields) + 1  # the metrics, and the loss last
RATIO_MAX: Final = PolicyMetrics._fields.index("ratio_max")  # the one that is no sum


@dataclass(frozen=True)
class Statistics:
    """(N,) each, float32; highest and total are between the kernels."""

    logprob_N: Tensor
    entropy_N: Tensor
    highest_N: Tensor
    total_N: Tensor


@dataclass(frozen=True)
class PolicyOutputs:
    """What the loss kernel writes besides the gradient: (N,) each, and (TERMS, N)."""

    logprob_N: Tensor
    entropy_N: Tensor
    kl_N: Tensor
    term_MN: Tensor


def empty(*shape: int, device: torch.device) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device=device)


# Tensors of their own, not slices of one: a registered op's results share no memory.


def empty_statistics(n: int, device: torch.device) -> Statistics:
    return Statistics(*(empty(n, device=device) for _ in range(4)))


def empty_policy_outputs(n: int, device: torch.device) -> PolicyOutputs:
    logprob_N, entropy_N, kl_N = (empty(n, device=device) for _ in range(3))
    return PolicyOutputs(logprob_N, entropy_N, kl_N, empty(TERMS, n, device=device))


def rows_of(x_NV: Tensor) -> Tensor:
    """The matrix with neighbouring logits side by side; a copy only where they were not."""
    return x_NV if x_NV.shape[1] <= 1 or x_NV.stride(1) == 1 else x_NV.contiguous()
