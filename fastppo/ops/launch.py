"""How the Triton kernels over rows of logits are launched: grids, sizes, pointers.

Which size a launch takes is one frozen table. FASTPPO_AUTOTUNE=1 times the table's sizes on the
first call for a vocabulary and dtype instead; results then differ between runs by rounding.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from fastppo.kernels import policy_loss as policy_loss_kernels
from fastppo.kernels import score_tokens as score_tokens_kernels
from fastppo.kernels import sums
from fastppo.kernels import token_logprobs as token_logprobs_kernels
from fastppo.ops.arguments import LossArguments, RowArguments
from fastppo.ops.outputs import TERMS, PolicyOutputs, Statistics, rows_of

AUTOTUNE: Final = os.environ.get("FASTPPO_AUTOTUNE") == "1"


@dataclass(frozen=True)
class RowConfig:
    """Logits that a program takes at a time, and the warps of 32 threads that share them."""

    block: int
    warps: int


# By bytes a logit, then by vocabulary. A thread holds 16 logits of two bytes or 8 of four: two
# loads of 16 bytes each, and three running sums a logit in its registers.
ROW_CONFIGS: Final[dict[int, tuple[tuple[int, RowConfig], ...]]] = {
    2: (
        (1024, RowConfig(1024, 4)),
        (8192, RowConfig(2048, 4)),
        (1 << 62, RowConfig(4096, 8)),
    ),
    4: (
        (1024, RowConfig(1024, 4)),
        (1 << 62, RowConfig(2048, 8)),
    ),
}
# Two rows side by side hold twice the sums: half the logits a thread.
PAIR_CONFIGS: Final[dict[int, tuple[tuple[int, RowConfig], ...]]] = {
    2: ((8192, RowConfig(1024, 4)), (1 << 62, RowConfig(2048, 8))),
    4: ((1024, RowConfig(512, 4)), (1 << 62, RowConfig(1024, 4))),
}
# What autotuning and the GPU suite try.
CANDIDATES: Final = tuple(
    RowConfig(block, warps)
    for block in (1024, 2048, 4096, 8192, 16384)
    for warps in (4, 8, 16)
    if 4 <= block // (32 * warps) <= 32
)


def row_config(itemsize: int, vocab: int, *, pair: bool = False) -> RowConfig:
    """The table's size for logits of `itemsize` bytes."""
    table = PAIR_CONFIGS if pair else ROW_CONFIGS
    return next(config for most, config in table[itemsize] if vocab <= most)


def warps_of(config: RowConfig) -> int:
    """How many warps make its threads; AMD's have 64."""
    return config.warps // 2 if torch.version.hip else config.warps


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to the current device, which may be another than the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def start(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    arguments: tuple[Any, ...],
    **meta: Any,
) -> None:
    """Launch a kernel on the device of its tensors; the only way in.

    Kernels read entry i of a vector at `ptr + i`. Arguments may have any stride, so a vector whose
    entries do not lie side by side is copied first. What a kernel writes is made here or in
    `outputs`, side by side.
    """
    packed = (x.contiguous() if isinstance(x, Tensor) and x.ndim == 1 else x for x in arguments)
    with on(device):
        kernel[grid](*packed, **meta)


@cache
def _tuned(kernel: Any) -> Any:
    import triton

    configs = [triton.Config({"BLOCK": c.block}, num_warps=warps_of(c)) for c in CANDIDATES]
    # The trials write their gradient, perhaps over the logits.
    return triton.autotune(configs=configs, key=["V"], restore_value=["x_ptr"])(kernel)


def _launch(
    kernel: Any, x_NV: Tensor, arguments: tuple[Any, ...], config: RowConfig | None, **meta: Any
) -> None:
    """One program a row of `x_NV`."""
    n, vocab = x_NV.shape
    if n == 0:
        return
    if AUTOTUNE and config is None and x_NV.device.type == "cuda":
        start(_tuned(kernel), (n,), x_NV.device, arguments, **meta)
        return
    pair = kernel is score_tokens_kernels.score_tokens_kernel
    size = config or row_config(x_NV.element_size(), vocab, pair=pair)
    meta |= {"BLOCK": size.block, "num_warps": warps_of(size)}
    start(kernel, (n,), x_NV.device, arguments, **meta)


def _temperature(rows: RowArguments) -> tuple[float | Tensor, int]:
    """The temperature and its kind: a float, a pointer to one, a pointer to one a row."""
    tau = rows.temperature_tensor
    return (rows.temperature, 0) if tau is None else (tau, 1 + tau.ndim)


def _common(rows: RowArguments) -> dict[str, Any]:
    return {"HAS_SOFTCAP": rows.softcap is not None, "TEMPERATURE_KIND": _temperature(rows)[1]}


def token_logprobs(
    x_NV: Tensor,
    rows: RowArguments,
    at: slice,
    into: Statistics,
    live_N: Tensor | None = None,
    config: RowConfig | None = None,
) -> None:
    """Statistics of rows `at`, whose logits `x_NV` are."""
    x_NV = rows_of(x_NV)
    arguments = (
        x_NV,
        rows.token_N,
        live_N,
        into.logprob_N,
        into.entropy_N,
        into.highest_N,
        into.total_N,
        _temperature(rows)[0],
        rows.softcap or 1.0,
        rows.ignore_index,
        at.start,
        x_NV.shape[1],
        x_NV.stride(0),
    )
    _launch(token_logprobs_kernels.token_logprobs_kernel, x_NV, arguments, config, **_common(rows))


def token_logprobs_backward(
    x_NV: Tensor,
    out_NV: Tensor,
    rows: RowArguments,
    at: slice,
    stats: Statistics,
    g_N: Tensor | None,
    h_N: Tensor | None,
    live_N: Tensor | None = None,
    config: RowConfig | None = None,
) -> None:
    """The gradient of rows `at` into `out_NV`, which may be `x_NV`."""
    x_NV = rows_of(x_NV)
    arguments = (
        x_NV,
        out_NV,
        rows.token_N,
        live_N,
        g_N,
        h_N,
        stats.logprob_N,
        stats.entropy_N,
        stats.highest_N,
        stats.total_N,
        _temperature(rows)[0],
        rows.softcap or 1.0,
        rows.ignore_index,
        at.start,
        x_NV.shape[1],
        x_NV.stride(0),
        out_NV.stride(0),
    )
    kernel = token_logprobs_kernels.token_logprobs_backward_kernel
    _launch(kernel, x_NV, arguments, config, **_common(rows))


def policy_loss(
    x_NV: Tensor,
    out_NV: Tensor | None,
    arguments: LossArguments,
    at: slice,
    into: PolicyOutputs,
    config: RowConfig | None = None,
) -> None:
    """Statistics and terms of rows `at`; their gradient into `out_NV`, which may be `x_NV`."""
    x_NV = rows_of(x_NV)
    rows, loss = arguments.rows, arguments
    tensors = (loss.kl_coef_tensor, loss.entropy_coef_tensor, loss.grad_scale_tensor)
    floats = (loss.kl_coef, loss.entropy_coef, loss.grad_scale)
    n = rows.token_N.numel()
    positional = (
        x_NV,
        out_NV,
        rows.token_N,
        loss.behaviour_logprob_N,
        loss.advantage_N,
        loss.weight_N,
        loss.ref_logprob_N,
        loss.importance_weight_N,
        into.logprob_N,
        into.entropy_N,
        into.kl_N,
        into.term_MN,
        _temperature(rows)[0],
        *(f if t is None else t for f, t in zip(floats, tensors, strict=True)),
        rows.softcap or 1.0,
        loss.clip_low,
        loss.clip_high,
        loss.dual_clip or 0.0,
        loss.log_ratio_limit,
        rows.ignore_index,
        at.start,
        x_NV.shape[1],
        x_NV.stride(0),
        0 if out_NV is None else out_NV.stride(0),
        n,
    )
    _launch(
        policy_loss_kernels.policy_loss_kernel,
        x_NV,
        positional,
        config,
        KL_KIND=loss.kl_kind,
        KL_COEF_ON_DEVICE=tensors[0] is not None,
        ENTROPY_COEF_ON_DEVICE=tensors[1] is not None,
        GRAD_SCALE_ON_DEVICE=tensors[2] is not None,
        HAS_ENTROPY=loss.has_entropy,
        HAS_DUAL_CLIP=loss.dual_clip is not None,
        TERMS=TERMS,
        **_common(rows),
    )


def score_tokens(
    x_NV: Tensor,
    ref_NV: Tensor,
    rows: RowArguments,
    at: slice,
    into: tuple[Tensor, Tensor, Tensor, Tensor],
    config: RowConfig | None = None,
) -> None:
    """Log-probs of both, entropy and exact KL of rows `at`."""
    x_NV, ref_NV = rows_of(x_NV), rows_of(ref_NV)
    arguments = (
        x_NV,
        ref_NV,
        rows.token_N,
        *into,
        _temperature(rows)[0],
        rows.softcap or 1.0,
        rows.ignore_index,
        at.start,
        x_NV.shape[1],
        x_NV.stride(0),
        ref_NV.stride(0),
    )
    _launch(score_tokens_kernels.score_tokens_kernel, x_NV, arguments, config, **_common(rows))


def sum_rows(x_MN: Tensor, *, maximum: int = -1) -> tuple[Tensor, Tensor]:
    """The sum of the last row, and those of the others; of row `maximum` the largest."""
    rows, n = x_MN.shape
    vector = torch.empty(rows - 1, dtype=torch.float32, device=x_MN.device)
    last = torch.empty((), dtype=torch.float32, device=x_MN.device)
    arguments = (x_MN, vector, last, n, x_MN.stride(0))
    meta = {"MAXIMUM": maximum, "LAST": rows - 1, "BLOCK": 1024}
    start(sums.sum_rows_kernel, (rows,), x_MN.device, arguments, **meta)
    return last, vector


def scale_unless_one(x: Tensor, factor: Tensor, divisor: float | Tensor) -> None:
    """x *= factor / divisor, in place, decided on the device; `x` may have any strides."""
    if not x.numel():
        return
    # Without gaps it is one long row.
    x_MN = x.view(1, -1) if x.is_contiguous() else x
    rows, columns = x_MN.shape
    block = 4096
    blocks = -(-columns // block)
    arguments = (x_MN, factor, divisor, columns, blocks, *x_MN.stride())
    meta = {"DIVISOR_ON_DEVICE": isinstance(divisor, Tensor), "BLOCK": block, "num_warps": 8}
    start(sums.scale_unless_one_kernel, (rows * blocks,), x.device, arguments, **meta)
