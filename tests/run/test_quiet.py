"""What bitsandbytes says at its import: the line on a kernel that is never used is dropped."""

from __future__ import annotations

import logging
import warnings

import pytest

from fastppo.packages import hide_unavoidable

UNUSED = "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure ..."


@pytest.fixture
def logger():
    """bitsandbytes' own logger, without filters before and after."""
    found = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kept, found.filters = found.filters, []
    yield found
    found.filters = kept


def test_the_line_on_an_unused_kernel_is_dropped_and_others_are_not(logger):
    hide_unavoidable()
    hide_unavoidable()
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


def test_a_word_that_peft_uses_and_transformers_drops_is_no_news(logger):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hide_unavoidable()
        warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    assert [str(each.message) for each in seen] == ["something else is deprecated"]
