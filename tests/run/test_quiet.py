"""What bitsandbytes says at its import: the line on a kernel that is never used is dropped."""

from __future__ import annotations

import logging

import pytest

from fastppo.packages import hide_unused_kernel

UNUSED = "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure ..."


@pytest.fixture
def logger():
    """bitsandbytes' own logger, without filters before and after."""
    found = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kept, found.filters = found.filters, []
    yield found
    found.filters = kept


def test_the_line_on_an_unused_kernel_is_dropped_and_others_are_not(logger):
    hide_unused_kernel()
    hide_unused_kernel()
    assert len(logger.filters) == 1
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        logger.warning(UNUSED, "no module named kernels")
        logger.warning("Failed to load CPU %s", "library")
        logger.error("broken")
    finally:
        logger.removeHandler(handler)
    assert said == ["Failed to load CPU library", "broken"]
