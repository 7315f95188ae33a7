"""silu(gate) up and its gradients in one pass each: right, at any size and at the ends."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import native_library
from fastppo.ops.gated_unit import gated_unit

pytestmark = pytest.mark.skipif(
    native_library.LIBRARY is None, reason=f"no native kernels: {native_library.OBSTACLE}"
)


def exact(gate, up, grad):
    """The unit and its gradients by autograd, in float64."""
    wide = [x.double().requires_grad_() for x in (gate, up)]
    out = torch.nn.functional.silu(wide[0]) * wide[1]
    return out.detach(), *torch.autograd.grad(out, wide, grad.double())


def found(gate, up, grad):
    own = [x.clone().requires_grad_() for x in (gate, up)]
    out = gated_unit(*own)
    return out.detach(), *torch.autograd.grad(out, own, grad)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 31), (7, 1536), (3, 4099)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_it_is_the_unit_with_its_gradients(isa, shape, scale):
    torch.manual_seed(shape[-1])
    gate, up, grad = scale * torch.randn(shape), torch.randn(shape), torch.randn(shape)
    for got, wanted in zip(found(gate, up, grad), exact(gate, up, grad), strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=3e-6)


def test_a_large_gate_is_a_line_and_a_small_one_nothing(isa):
    gate = torch.tensor([-1e30, -200.0, -0.0, 0.0, 200.0, 1e30])
    up, grad = torch.full_like(gate, 2.0), torch.ones_like(gate)
    out, d_gate, d_up = found(gate, up, grad)
    assert out.tolist() == pytest.approx([0, 0, 0, 0, 400, 2e30], rel=1e-6, abs=1e-6)
    assert d_gate.tolist() == pytest.approx([0, 0, 1, 1, 2, 2], rel=1e-6, abs=1e-6)
    assert d_up.tolist() == pytest.approx([0, 0, 0, 0, 200, 1e30], rel=1e-6, abs=1e-6)


def test_what_is_not_finite_stays_so(isa):
    gate = torch.tensor([float("nan"), float("inf"), 1.0, 1.0])
    up = torch.tensor([1.0, 1.0, float("nan"), float("inf")])
    assert not any(torch.isfinite(x).any() for x in found(gate, up, torch.ones(4))[:1])
    assert not torch.isfinite(gated_unit(gate, up)).any()


def test_a_number_is_the_same_to_the_bit_at_any_place(isa):
    torch.manual_seed(0)
    given = [torch.randn(41, 331) for _ in range(3)]
    together = found(*given)
    for row in (0, 1, 19, 40):
        for got, whole in zip(found(*(x[row : row + 1] for x in given)), together, strict=True):
            assert torch.equal(got[0], whole[row])
    turned = found(*(x.t().contiguous().t() for x in given))
    assert all(torch.equal(a, b) for a, b in zip(turned, together, strict=True))


def test_with_or_without_a_gradient_it_is_the_same_to_the_bit(isa):
    torch.manual_seed(0)
    gate, up = torch.randn(5, 77), torch.randn(5, 77)
    assert torch.equal(gated_unit(gate, up), found(gate, up, torch.ones(5, 77))[0])
    assert gated_unit(gate, up.requires_grad_()).requires_grad
    with torch.no_grad():
        assert not gated_unit(gate, up).requires_grad
