"""Units of memory, and how much of it a run leaves free."""

from __future__ import annotations

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
# On a GPU, for the context, the libraries' workspaces, and fragments that the allocator cannot use.
RESERVE: Final = 5 * GIB // 4
