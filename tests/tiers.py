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


def interpreted(fast: Callable[..., bool]) -> pytest.MarkDecorator:
    """Of a test's cases under Triton's interpreter `make test` runs those for which `fast` holds.

    It is called with the parameters of the case that it names. The interpreter takes 20 ms a row
    and the other backends next to nothing, which run every case; and so does a GPU.
    """
    return pytest.mark.interpreted(fast=fast)
