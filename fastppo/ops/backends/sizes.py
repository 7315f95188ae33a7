"""How many logits a Triton program takes at a time: one frozen table, and what autotuning tries.

FASTPPO_AUTOTUNE=1 times the candidates on the first call for a vocabulary and dtype instead of
asking the table; results then differ between runs by rounding.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch

AUTOTUNE: Final = os.environ.get("FASTPPO_AUTOTUNE") == "1"


@dataclass(frozen=True)
class RowConfig:
    """Logits that a program takes at a time, and the warps of 32 threads that share them."""

    block: int
    warps: int


# By bytes a logit, then by vocabulary. A thread holds 16 logits of two bytes or 8 of four: two
# loads of 16 bytes each, and three running sums a logit in its registers.
ROW_CONFIGS: Final[dict[int, tuple[tuple[int, RowConfig], ...]]] = {
    2: (
        (1024, RowConfig(1024, 4)),
        (8192, RowConfig(2048, 4)),
        (1 << 62, RowConfig(4096, 8)),
    ),
    4: (
        (1024, RowConfig(1024, 4)),
        (1 << 62, RowConfig(2048, 8)),
    ),
}
# Two rows side by side hold twice the sums: half the logits a thread.
PAIR_CONFIGS: Final[dict[int, tuple[tuple[int, RowConfig], ...]]] = {
    2: ((8192, RowConfig(1024, 4)), (1 << 62, RowConfig(2048, 8))),
    4: ((1024, RowConfig(512, 4)), (1 << 62, RowConfig(1024, 4))),
}
# What autotuning and the GPU suite try.
CANDIDATES: Final = tuple(
    RowConfig(block, warps)
    for block in (1024, 2048, 4096, 8192, 16384)
    for warps in (4, 8, 16)
    if 4 <= block // (32 * warps) <= 32
)

BLOCK: Final = 1024  # tokens
# Associative scans of more lanes need registers that grow with them. With 4 warps the kernel of
# advantages spills on sm_100; with 8 that of GAE has too many registers for two programs there.
GAE_SCAN: Final = {"BLOCK": 1024, "num_warps": 4}
ADVANTAGES_SCAN: Final = {"BLOCK": 1024, "num_warps": 8}


@cache
def row_config(itemsize: int, vocab: int, *, pair: bool = False) -> RowConfig:
    """The table's size for logits of `itemsize` bytes."""
    table = PAIR_CONFIGS if pair else ROW_CONFIGS
    return next(config for most, config in table[itemsize] if vocab <= most)


@cache
def warps_of(config: RowConfig) -> int:
    """How many warps make its threads; AMD's have 64."""
    return config.warps // 2 if torch.version.hip else config.warps


@cache
def tuned(kernel: Any) -> Any:
    """The kernel, its size timed at the first call."""
    import triton

    configs = [triton.Config({"BLOCK": c.block}, num_warps=warps_of(c)) for c in CANDIDATES]
    # The trials write their gradient, perhaps over the logits.
    return triton.autotune(configs=configs, key=["V"], restore_value=["x_ptr"])(kernel)
