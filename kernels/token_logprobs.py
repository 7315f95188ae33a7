"""Log-prob of the sampled token and entropy of a row, forward and backward.

A program goes over one row, or over every num_programs-th. Logits are those of rows first_row
onwards, a chunk; what is one a token is whole.
"""

import triton
import triton.language as tl

from fastppo.kernels.compilation import kernel
from fastppo.kernels.gradient import write_gradient
from fastppo.kernels.row import row_logprob, row_temperature
from fastppo.kernels.tile import fill_zero, row_of


@triton.jit
def takes_part(token, ignore_index, live_ptr, row):
    """`live_ptr` is a weight a row, 0 where the row takes no part, or None: the token decides."""
    live = token != ignore_index
    if live_ptr is not None:
        live = live & (tl.load(live_ptr + row).to(tl.float32) != 0)
    return live


@kernel("ignore_index", "first_row", "n_rows", "V", "x_stride")
def token_logprobs_kernel(
    x_ptr,
    token_ptr,
    live_ptr,
    logprob_ptr,
    entropy_ptr,
    row_max_ptr,
    sum_exp_ptr,
    temperature,
    softcap,
    ignore_index,
    first_row,
    n_rows,
    V,
    x_stride,
    HAS_SOFTCAP: tl.constexpr,
    TEMPERATURE_KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    METHOD: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Statistics of the rows that take part."""
    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        own = tl.cast(index, tl.int64)  # another name: Triton 3.4 keeps a name's type in a loop
        row = first_row + own
        token = tl.load(token_ptr + row)
        logprob = 0.0
        entropy = 0.0
        row_max = 0.0
        sum_exp = 1.0
        if takes_part(token, ignore_index, live_ptr, row):
            row_ptr = row_of(x_ptr, own, x_stride, ALIGNED)
            tau = row_temperature(temperature, row, TEMPERATURE_KIND)
            logprob, entropy, row_max, sum_exp = row_logprob(
                row_ptr,
                None,
                token,
                V,
                softcap,
                tau,
                HAS_SOFTCAP,
                ALIGNED,
                METHOD,
                TILES,
                THREADS,
            )
        tl.store(logprob_ptr + row, logprob)
        tl.store(entropy_ptr + row, entropy)
        tl.store(row_max_ptr + row, row_max)
        tl.store(sum_exp_ptr + row, sum_exp)


@kernel("ignore_index", "first_row", "n_rows", "V", "x_stride", "dx_stride")
def token_logprobs_backward_kernel(
    x_ptr,
    dx_ptr,
    token_ptr,
    live_ptr,
    g_ptr,
    h_ptr,
    logprob_ptr,
    entropy_ptr,
    row_max_ptr,
    sum_exp_ptr,
    temperature,
    softcap,
    ignore_index,
    first_row,
    n_rows,
    V,
    x_stride,
    dx_stride,
    HAS_SOFTCAP: tl.constexpr,
    TEMPERATURE_KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    METHOD: tl.constexpr,
    TOGETHER: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """`g_ptr` and `h_ptr`, gradients of log-prob and entropy; either may be None."""
    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        own = tl.cast(index, tl.int64)  # another name: Triton 3.4 keeps a name's type in a loop
        row = first_row + own
        token = tl.load(token_ptr + row)
        out_ptr = row_of(dx_ptr, own, dx_stride, ALIGNED)
        if takes_part(token, ignore_index, live_ptr, row):
            tau = row_temperature(temperature, row, TEMPERATURE_KIND)
            g = 0.0
            if g_ptr is not None:
                g = tl.load(g_ptr + row).to(tl.float32)
                # A sampled token of masked vocabulary cannot be made likelier.
                g = tl.where(tl.load(logprob_ptr + row) == float("-inf"), 0.0, g)
            h = 0.0
            if h_ptr is not None:
                h = tl.load(h_ptr + row).to(tl.float32)
            write_gradient(
                row_of(x_ptr, own, x_stride, ALIGNED),
                None,
                out_ptr,
                V,
                token,
                tl.load(row_max_ptr + row),
                tl.load(sum_exp_ptr + row),
                tl.load(entropy_ptr + row),
                g,
                h,
                softcap,
                tau,
                HAS_SOFTCAP,
                h_ptr is not None,
                ALIGNED,
                METHOD,
                TOGETHER,
                TILES,
                THREADS,
            )
        else:
            fill_zero(out_ptr, V, ALIGNED, THREADS)
