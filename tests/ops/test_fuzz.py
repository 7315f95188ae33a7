"""Random calls of every op on every backend, by the oracle's rule; each follows from its number."""

from __future__ import annotations

import pytest

from fastppo.ops.backend import available
from tests.ops import fuzz
from tests.ops.conftest import DEVICE

SHOWN = 5


def holds(numbers: range) -> None:
    """All these calls; those that fail are printed with what was called."""
    backends = sorted(available(DEVICE))
    found = [fuzz.verdict(number, backends) for number in numbers]
    failed = [text for text in found if text is not None]
    shown = "\n".join(failed[:SHOWN])
    assert not failed, f"{len(failed)} of {len(numbers)} calls fail:\n{shown}"


def test_100_random_calls():
    holds(range(100))


@pytest.mark.slow
@pytest.mark.parametrize("thousand", range(3))
def test_3_000_random_calls(thousand):
    holds(range(1000 * thousand, 1000 * (thousand + 1)))
