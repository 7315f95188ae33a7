"""How many examples a property is tried on."""

from __future__ import annotations

import pytest
from hypothesis import settings


def pytest_configure(config: pytest.Config) -> None:
    """The fast suite tries the first quarter of those that the slow one tries (test_fuzz.py).

    A configuration of random keys takes 20 ms, and examples are the same in every run.
    """
    settings.register_profile("fast", max_examples=25)
    if "not slow" in config.option.markexpr:
        settings.load_profile("fast")
