"""Units of memory, and what a run leaves free of it."""

from __future__ import annotations

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
# Of a GPU: the context, the libraries' workspaces, and what the caching allocator cannot use again.
RESERVE: Final = 5 * GIB // 4
