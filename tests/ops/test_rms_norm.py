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


@pytest.mark.parametrize("size", [1, 5, 32, 64, 576, 1001])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_its_gradient_is_that_of_the_definition(isa, size, scale):
    torch.manual_seed(size)
    x, weight, grad = scale * torch.randn(3, 2, size), torch.randn(size), torch.randn(3, 2, size)
    wide = x.double().requires_grad_()
    exact = wide * weight.double() / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    (wanted,) = torch.autograd.grad(exact, wide, grad.double())
    own = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(rms_norm(own, weight, 1e-5), own, grad)
    # It is the difference of two terms, of which one element leaves next to nothing.
    term = (exact.detach() / wide.detach() * grad).abs().max().item()
    torch.testing.assert_close(found.double(), wanted, atol=1e-6 * term, rtol=1e-5)


def test_with_or_without_a_gradient_it_is_the_same_to_the_bit(isa):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(9, 331), torch.randn(331), torch.randn(9, 331)
    own = x.clone().requires_grad_()
    out = rms_norm(own, weight, 1e-6)
    assert torch.equal(out, rms_norm(x, weight, 1e-6))
    (together,) = torch.autograd.grad(out, own, grad)
    (turned,) = torch.autograd.grad(rms_norm(own, weight, 1e-6), own, grad.t().contiguous().t())
    assert torch.equal(turned, together)
    for row in range(9):
        part = x[row : row + 1].clone().requires_grad_()
        (found,) = torch.autograd.grad(rms_norm(part, weight, 1e-6), part, grad[row : row + 1])
        assert torch.equal(found[0], together[row])


def test_the_gradient_of_its_weight_is_that_of_the_definition(isa):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(3, 7, 100), torch.randn(100), torch.randn(3, 7, 100)
    wide = weight.double().requires_grad_()
    exact = x.double() * wide / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    (wanted,) = torch.autograd.grad(exact, wide, grad.double())
    for both in (False, True):  # with x frozen, as in the first layer, and with x trained
        own = [weight.clone().requires_grad_(), x.clone().requires_grad_(both)]
        out = rms_norm(own[1], own[0], 1e-5)
        found = torch.autograd.grad(out, own[: 1 + both], grad)
        torch.testing.assert_close(found[0].double(), wanted, atol=1e-5, rtol=1e-5)
