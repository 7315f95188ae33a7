"""What finishes a two-stage reduction, in one order: the same bits every time."""

import triton.language as tl

from fastppo.kernels.compilation import kernel


@kernel("n", "stride")
def sum_rows_kernel(
    x_ptr,
    out_ptr,
    last_ptr,
    n,
    stride,
    MAXIMUM: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[r] = sum of x[r, :n], one program a row; row LAST goes to a tensor of its own.

    Of row MAXIMUM it is the largest, at least 0.
    """
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    row_ptr = x_ptr + row.to(tl.int64) * stride
    total = tl.zeros([BLOCK], tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        x = tl.load(row_ptr + start + lane, mask=start + lane < n, other=0.0)
        total += x
        largest = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
    if row == MAXIMUM:
        # tl.max drops NaN, a sum of 0 * x does not.
        tl.store(out_ptr + row, tl.max(largest, 0) + tl.sum(largest * 0.0, 0))
    elif row == LAST:
        tl.store(last_ptr, tl.sum(total, 0))
    else:
        tl.store(out_ptr + row, tl.sum(total, 0))


@kernel("columns", "blocks", "total", "row_stride", aligned=("x_ptr",))
def scale_unless_one_kernel(
    x_ptr,
    factor_ptr,
    divisor,
    columns,
    blocks,
    total,
    row_stride,
    column_stride,
    DIVISOR_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x *= factor / divisor, in `total` blocks, `blocks` a row; nothing is read where that is 1.

    The host need not know, so it launches a few programs, which share the blocks. Nothing between
    the rows is touched: x may be a view of more.
    """
    factor = tl.load(factor_ptr).to(tl.float32)
    if DIVISOR_ON_DEVICE:
        divisor = tl.load(divisor).to(tl.float32)
    factor = factor / divisor
    if factor != 1.0:
        for block in range(tl.program_id(0), total, tl.num_programs(0)):
            row = tl.cast(block // blocks, tl.int64)
            at = tl.cast(block % blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            place = x_ptr + row * row_stride + at * column_stride
            x = tl.load(place, mask=at < columns, other=0.0)
            scaled = x.to(tl.float32) * factor
            tl.store(place, scaled.to(x_ptr.dtype.element_ty), mask=at < columns)
