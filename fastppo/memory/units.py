"""Units of memory, and how much of it a run leaves free."""

from __future__ import annotations

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
# On a GPU, for the context, the libraries' workspaces, and fragments that the allocator cannot use.
RESERVE: Final = 5 * GIB // 4
# What CUDA's context of a process has taken of a GPU; of the trainer's process it is in RESERVE.
CONTEXT: Final = GIB // 2

# Tokens of prompts that sampling runs at a time. A GPU's matrix products are at full speed with
# fewer; more would only take memory.
PREFILL_TOKENS: Final = 2048
# Places of a slot of the KV cache beyond the longest row, if rows enter later: all rows are moved
# back once in so many steps.
SLACK: Final = 64
# Gradients that several processes add up at a time, in a copy that has them one after another.
REDUCED_BYTES: Final = 64 * MIB
