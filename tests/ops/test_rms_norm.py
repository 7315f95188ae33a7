"""RMS norm in one pass: right, and the same to the bit in any batch."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import native_library
from fastppo.ops.rms_norm import rms_norm

pytestmark = pytest.mark.skipif(
    native_library.LIBRARY is None, reason=f"no native kernels: {native_library.OBSTACLE}"
)


@pytest.mark.parametrize("size", [1, 5, 32, 64, 576, 1001])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_it_is_the_norm(isa, size, scale):
    torch.manual_seed(size)
    x, weight = scale * torch.randn(3, 2, size), torch.randn(size)
    wide = x.double()
    exact = wide * weight.double() / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), exact, atol=1e-12, rtol=1e-6)


def test_a_row_is_the_same_to_the_bit_in_any_batch(isa):
    torch.manual_seed(0)
    x, weight = torch.randn(9, 331), torch.randn(331)
    together = rms_norm(x, weight, 1e-6)
    for row in range(9):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6), together[row : row + 1])
    assert torch.equal(rms_norm(x.t().contiguous().t(), weight, 1e-6), together)
