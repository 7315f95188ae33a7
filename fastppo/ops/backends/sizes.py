"""How many logits a Triton program reads at a time: a fixed table, and autotuning's candidates.

With FASTPPO_AUTOTUNE=1 the first call for a vocabulary and dtype times the candidates, and the
table is not used; results of two runs then differ by rounding.
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
    """Number of logits that a program reads at a time, and of the warps that share them."""

    block: int
    warps: int


# Bytes of a logit -> (largest vocabulary, size), in ascending order. A thread holds 16 logits of
# two bytes or 8 of four: two loads of 16 bytes each, and three running sums a logit in registers.
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
# Kernels that read two rows at once keep twice the sums, so a thread gets half the logits.
PAIR_CONFIGS: Final[dict[int, tuple[tuple[int, RowConfig], ...]]] = {
    2: ((8192, RowConfig(1024, 4)), (1 << 62, RowConfig(2048, 8))),
    4: ((1024, RowConfig(512, 4)), (1 << 62, RowConfig(1024, 4))),
}
# The sizes that autotuning and the GPU suite try.
CANDIDATES: Final = tuple(
    RowConfig(block, warps)
    for block in (1024, 2048, 4096, 8192, 16384)
    for warps in (4, 8, 16)
    if 4 <= block // (32 * warps) <= 32
)

BLOCK: Final = 1024  # tokens
# An associative scan needs more registers the more lanes it has. With 4 warps the kernel of
# advantages spills on sm_100; with 8 that of GAE has too many registers for two programs there.
GAE_SCAN: Final = {"BLOCK": 1024, "num_warps": 4}
ADVANTAGES_SCAN: Final = {"BLOCK": 1024, "num_warps": 8}


@cache
def row_config(itemsize: int, vocab: int, *, pair: bool = False) -> RowConfig:
    """The size for a vocabulary with logits of `itemsize` bytes, from the table."""
    table = PAIR_CONFIGS if pair else ROW_CONFIGS
    return next(config for most, config in table[itemsize] if vocab <= most)


@cache
def warps_of(config: RowConfig) -> int:
    """The number of warps for this many threads; on AMD a warp has 64 threads, not 32."""
    return config.warps // 2 if torch.version.hip else config.warps


@cache
def tuned(kernel: Any) -> Any:
    """The kernel with autotuning: its first call times the candidates."""
    import triton

    configs = [triton.Config({"BLOCK": c.block}, num_warps=warps_of(c)) for c in CANDIDATES]
    # Each trial may overwrite the logits with the gradient, so they are restored.
    return triton.autotune(configs=configs, key=["V"], restore_value=["x_ptr"])(kernel)
