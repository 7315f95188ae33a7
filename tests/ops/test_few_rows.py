"""A linear layer of few rows: right, and the same to the bit in any batch."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import native_library
from fastppo.ops.few_rows import MOST_ROWS, few_rows_linear, runs_native, suits
from tests.tiers import slow_unless

pytestmark = pytest.mark.skipif(
    native_library.LIBRARY is None, reason=f"no native kernels: {native_library.OBSTACLE}"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(rows, inputs, outputs, dtype, stride=None):
    torch.manual_seed(rows + inputs + outputs)
    weight = torch.randn(outputs, stride or inputs).to(dtype)[:, :inputs]
    return torch.randn(rows, inputs).to(dtype), weight, torch.randn(outputs).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", slow_unless(lambda rows: rows in (1, 7), [1, 2, 3, 4, 7, 32]))
@pytest.mark.parametrize(
    ("inputs", "outputs", "stride"), [(1, 1, 1), (5, 3, 9), (576, 41, 576), (1000, 130, 1003)]
)
def test_it_is_the_linear_layer(isa, dtype, rows, inputs, outputs, stride):
    x, weight, bias = operands(rows, inputs, outputs, dtype, stride)
    for own in (bias, None):
        added = torch.zeros(outputs) if own is None else own
        exact = x.double() @ weight.double().T + added.double()
        # What a sum of products in float32 may lose, and one rounding to the result's dtype.
        size = x.double().abs() @ weight.double().abs().T + added.double().abs()
        bound = size * 1e-6 + exact.abs() * torch.finfo(dtype).eps / 2
        found = few_rows_linear(x, weight, own)
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= bound).all()


def test_leading_dimensions_are_kept():
    x, weight, bias = operands(6, 20, 8, torch.float32)
    found = few_rows_linear(x.view(3, 2, 20), weight, bias)
    assert torch.equal(found, few_rows_linear(x, weight, bias).view(3, 2, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_to_the_bit_in_any_batch_and_for_any_number_of_threads(isa, dtype):
    x, weight, bias = operands(11, 331, 210, dtype)
    together = few_rows_linear(x, weight, bias)
    for rows in ([3], [0, 10], [10, 9, 8], list(range(10, 4, -1))):
        assert torch.equal(few_rows_linear(x[rows], weight, bias), together[rows])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            assert torch.equal(few_rows_linear(x, weight, bias), together)
    finally:
        torch.set_num_threads(threads)


def test_what_it_does_not_compute_is_left_to_the_library():
    x, weight, _ = operands(4, 16, 8, torch.float32)
    with torch.no_grad():
        assert runs_native(weight)
        assert suits(x, weight)
        assert not suits(torch.zeros(MOST_ROWS + 1, 16), weight)
        assert not suits(x.double(), weight)
        assert not suits(x[:, :8], weight.T)  # its rows do not lie side by side
        with torch.autocast("cpu", torch.bfloat16):
            assert not suits(x, weight)
    assert not suits(x, weight)  # a gradient may be wanted
    assert not runs_native(weight.double())
    assert not runs_native(weight.to("meta"))


def test_nan_stays_in_its_row():
    x, weight, bias = operands(4, 16, 8, torch.float32)
    x[1, 3] = torch.nan
    found = few_rows_linear(x, weight, bias)
    assert found[1].isnan().all()
    assert found[[0, 2, 3]].isfinite().all()
