"""Advantages from several responses to one prompt, without a critic."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fastppo.ops.arguments import check_floating

GROUP_ADVANTAGES: Final = ("grpo", "dr_grpo", "rloo", "reinforce++_baseline")
SCALES: Final = ("group", "batch", "none")


@torch.no_grad()
def group_advantages(
    reward_B: Tensor,
    group_size: int,
    *,
    kind: str = "grpo",
    scale: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    r"""One advantage for each response: its reward R_i relative to the n responses to its prompt.

        grpo:                  (R_i - mean) / (std + eps)
        dr_grpo:               R_i - mean
        rloo:                  R_i - mean of the other n - 1
        reinforce++_baseline:  R_i - mean, to be whitened over the tokens (`fastppo.ops.whiten`)

    Args:
        reward_B: float (B,), the n responses to one prompt side by side.
        group_size: n >= 2, which divides B.
        kind: "grpo", "dr_grpo", "rloo" or "reinforce++_baseline".
        scale: what grpo's std (unbiased) is of: "group", "batch" or "none", which leaves it out.
        eps: >= 0; TRL's 1e-4, verl has 1e-6.

    Returns:
        advantage_B, of the rewards' dtype, without gradient.

    Raises:
        ValueError: an unknown kind or scale, a group size that does not fit.
        TypeError: rewards that are not floating point.

    Source: Shao et al. 2024, arXiv 2402.03300 (GRPO); Liu et al. 2025, arXiv 2503.20783 (Dr. GRPO);
        Ahmadian et al. 2024, arXiv 2402.14740 (RLOO); Hu 2025, arXiv 2501.03262 (REINFORCE++).
    """
    op = "group_advantages"
    check_floating(op, "reward_B", reward_B, ndim=1)
    if kind not in GROUP_ADVANTAGES:
        raise ValueError(f"{op}: kind must be one of {', '.join(GROUP_ADVANTAGES)}, came {kind!r}")
    if scale not in SCALES:
        raise ValueError(f"{op}: scale must be one of {', '.join(SCALES)}, came {scale!r}")
    if group_size < 2 or reward_B.numel() % group_size:
        raise ValueError(
            f"{op}: group_size must be at least 2 and divide B={reward_B.numel()}, "
            f"came {group_size}"
        )
    n, reward_Gn = group_size, reward_B.reshape(-1, group_size)
    centred_Gn = reward_Gn - reward_Gn.mean(1, keepdim=True)
    if kind == "rloo":
        centred_Gn = centred_Gn * n / (n - 1)
    if kind == "grpo" and scale == "group":
        centred_Gn = centred_Gn / (reward_Gn.std(1, keepdim=True) + eps)
    elif kind == "grpo" and scale == "batch":
        centred_Gn = centred_Gn / (reward_B.std() + eps)
    return centred_Gn.flatten()
