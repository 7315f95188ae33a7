"""Which values of a parametrised test are in the fast tier, where one of a kind says most."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(fast: Callable[..., bool], values: Iterable[Any]) -> list[Any]:
    """Parameters of a test; `make test` runs those for which `fast(...)` holds, test-all all."""
    marked = []
    for value in values:
        parts = value if isinstance(value, tuple) else (value,)
        marks = () if fast(*parts) else (pytest.mark.slow,)
        marked.append(pytest.param(*parts, marks=marks))
    return marked
