"""The interpreter's shortcuts give what Triton's own interpreter gives."""

from __future__ import annotations

import pytest
import torch

from tests.ops.conftest import DEVICE, FUSED

if "triton" not in FUSED or DEVICE != "cpu":
    pytest.skip("nothing is interpreted here", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.interpreter import ScanOps

from tests.ops import interpreter


@triton.jit
def then(earlier_factor, earlier_value, factor, value):
    """One step y = factor * x + value after another: they do not commute."""
    return earlier_factor * factor, value + factor * earlier_value


@triton.jit
def scan_kernel(factor_ptr, value_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    steps = (tl.load(factor_ptr + lane), tl.load(value_ptr + lane))
    factor, value = tl.associative_scan(steps, 0, then)
    tl.store(factor_ptr + lane, factor)
    tl.store(value_ptr + lane, value)


@pytest.mark.parametrize("lanes", [1, 2, 64])
def test_a_scan_of_whole_vectors_is_that_of_lane_after_lane(lanes, monkeypatch):
    """Of integers, which no order of additions rounds."""
    steps = torch.randint(-3, 4, (2, lanes), dtype=torch.int64)
    found = []
    for how in (interpreter.scan, interpreter.scan_lane_by_lane):
        monkeypatch.setattr(ScanOps, "generic_scan", how)
        factor, value = steps.clone()
        scan_kernel[(1,)](factor, value, BLOCK=lanes)
        found.append((factor.tolist(), value.tolist()))
    assert found[0] == found[1]
    x = 0
    for factor, value, y in zip(*steps.tolist(), found[0][1], strict=True):
        # By hand, in integers of 64 bits.
        x = (factor * x + value + 2**63) % 2**64 - 2**63
        assert y == x
