"""What tests count as allocated is the same on every processor."""

from __future__ import annotations

import pytest
import torch

from tests.memory.allocations import profiled_allocations

ROWS, WIDE, OUT = 400, 192, 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gemm_allocates_its_result(dtype):
    x, weight = torch.ones(ROWS, WIDE, dtype=dtype), torch.ones(WIDE, OUT, dtype=dtype)
    bias = torch.ones(OUT, dtype=dtype)
    for multiply in (lambda: x @ weight, lambda: torch.addmm(bias, x, weight)):
        with profiled_allocations() as found:
            result = multiply()
        assert found.peak == found.end == result.nbytes
        del result


def test_what_is_converted_outside_of_the_gemm_is_counted_though_it_is_soon_released():
    x, weight = torch.ones(ROWS, WIDE).bfloat16(), torch.ones(WIDE, OUT).bfloat16()
    with profiled_allocations() as found:
        result = (x.float() @ weight.float()).bfloat16()
    assert found.peak == 4 * (ROWS * WIDE + WIDE * OUT + ROWS * OUT)
    assert found.end == result.nbytes


def test_a_copy_of_all_rows_that_lives_between_two_gemms_is_counted():
    x, weight = torch.ones(ROWS, WIDE).bfloat16(), torch.ones(WIDE, WIDE).bfloat16()
    with profiled_allocations() as found:
        first = x @ weight
        copy = first.float()
        second = copy.bfloat16() @ weight
    # Alive at the end: two results in bf16 and the copy; on the way the copy's own bf16.
    assert found.end == first.nbytes + copy.nbytes + second.nbytes
    assert found.peak == found.end + first.nbytes
