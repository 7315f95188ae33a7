"""Launches of the Triton kernels: their grids, sizes and arguments; see `Backend`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppo.kernels import policy_loss as policy_loss_kernels
from fastppo.kernels import score_tokens as score_tokens_kernels
from fastppo.kernels import token_logprobs as token_logprobs_kernels
from fastppo.ops.arguments import LossArguments, RowArguments, rows_of
from fastppo.ops.backends import LossRows, Scores, Statistics
from fastppo.ops.backends.definition import token_kl_backward as token_kl_backward
from fastppo.ops.backends.launch import multiprocessors, placement, start
from fastppo.ops.backends.sizes import (
    AUTOTUNE,
    RowConfig,
    chosen,
    for_one_read,
    tuned,
    warps_of,
)
from fastppo.ops.backends.triton_tokens import advantages as advantages
from fastppo.ops.backends.triton_tokens import gae as gae
from fastppo.ops.backends.triton_tokens import moments as moments
from fastppo.ops.backends.triton_tokens import scale_unless_one as scale_unless_one
from fastppo.ops.backends.triton_tokens import sum_rows
from fastppo.ops.backends.triton_tokens import token_kl as token_kl
from fastppo.ops.backends.triton_tokens import value_loss as value_loss
from fastppo.ops.backends.triton_tokens import whiten as whiten
from fastppo.ops.surrogate import RATIO_MAX, TERMS


def _config(
    given: RowConfig | None, x_NV: Tensor, *, pair: bool = False, twice: bool = False
) -> RowConfig | None:
    """The configuration that is given, or the launch table's; None where autotuning finds it."""
    itemsize, vocab, device = x_NV.element_size(), x_NV.shape[1], x_NV.device
    if given is None:
        if AUTOTUNE and device.type == "cuda":
            return None
        given = chosen(itemsize, vocab, pair=pair, twice=twice, device=device)
    if not twice:
        return for_one_read(given, pair=pair)
    if given.method == "held" and not given.holds(itemsize, vocab):
        raise ValueError(
            f"'{given}' cannot hold a row of {vocab} logits of {itemsize} bytes: its tile is "
            "shorter; take one of sizes.candidates"
        )
    return given


def _launch(
    kernel: Any,
    x_NV: Tensor,
    other_NV: Tensor | None,
    arguments: tuple[Any, ...],
    config: RowConfig | None,
    **meta: Any,
) -> None:
    """Launch a kernel over the rows of `x_NV`; `other_NV` is their gradient or their reference.

    Without a `config` the kernel's first call times some.
    """
    n, device = x_NV.shape[0], x_NV.device
    if n == 0:
        return
    meta |= placement(x_NV, other_NV)
    if kernel is token_logprobs_kernels.token_logprobs_kernel:
        del meta["TOGETHER"]
    if kernel is not score_tokens_kernels.score_tokens_kernel:
        method = "tiles" if config is None else config.method
        meta["METHOD"] = "tiles" if method == "two launches" else method
    if config is None:
        start(tuned(kernel), (n,), device, arguments, **meta)
        return
    programs = min(n, config.programs * multiprocessors(device) or n)
    meta |= {"TILES": config.tiles, "THREADS": config.threads, "num_warps": warps_of(config)}
    start(kernel, (programs,), device, arguments, **meta)


def _common(rows: RowArguments, at: slice, x_NV: Tensor) -> tuple[Any, ...]:
    """The last arguments of the kernels that compute no loss."""
    place = (rows.ignore_index, at.start, *x_NV.shape, x_NV.stride(0))
    return (rows.temperature, rows.softcap or 1.0, *place)


def _kinds(rows: RowArguments) -> dict[str, Any]:
    """Compile-time flags: is there a softcap, and is the temperature a float, 0-d, or one a row?"""
    tau = rows.temperature
    kind = 1 + tau.ndim if isinstance(tau, Tensor) else 0
    return {"HAS_SOFTCAP": rows.softcap is not None, "TEMPERATURE_KIND": kind}


def token_logprobs(
    x_NV: Tensor,
    rows: RowArguments,
    at: slice,
    into: Statistics,
    weight_N: Tensor | None = None,
    config: RowConfig | None = None,
) -> None:
    """Write the statistics of the rows `at` into `into`; rows of weight 0 are not read."""
    x_NV = rows_of(x_NV)
    arguments = (
        x_NV,
        rows.token_N,
        weight_N,
        *into,
        *_common(rows, at, x_NV),
    )
    kernel = token_logprobs_kernels.token_logprobs_kernel
    _launch(kernel, x_NV, None, arguments, _config(config, x_NV), **_kinds(rows))


def token_logprobs_backward(
    x_NV: Tensor,
    out_NV: Tensor,
    rows: RowArguments,
    at: slice,
    stats: Statistics,
    g_N: Tensor | None,
    h_N: Tensor | None,
    weight_N: Tensor | None = None,
    config: RowConfig | None = None,
) -> None:
    """Write the gradient of the rows `at` into `out_NV`, which may be `x_NV` itself."""
    x_NV = rows_of(x_NV)
    arguments = (
        x_NV,
        out_NV,
        rows.token_N,
        weight_N,
        g_N,
        h_N,
        *stats,
        *_common(rows, at, x_NV),
        out_NV.stride(0),
    )
    kernel = token_logprobs_kernels.token_logprobs_backward_kernel
    _launch(kernel, x_NV, out_NV, arguments, _config(config, x_NV), **_kinds(rows))


def policy_loss(
    x_NV: Tensor,
    out_NV: Tensor | None,
    rows: RowArguments,
    loss: LossArguments,
    at: slice,
    into: LossRows,
    config: RowConfig | None = None,
) -> None:
    """Write the loss's results for the rows `at`, and their gradient into `out_NV` if given."""
    x_NV = rows_of(x_NV)
    config = _config(config, x_NV, twice=out_NV is not None)
    row_max_N = sum_exp_N = None
    if config is not None and config.method == "two launches":
        n = rows.token_N.numel()
        row_max_N, sum_exp_N = x_NV.new_empty((2, n), dtype=torch.float32)
        stats = Statistics(into.logprob_N, into.entropy_N, row_max_N, sum_exp_N)
        token_logprobs(x_NV, rows, at, stats, loss.weight_N, config)
    arguments = (
        x_NV,
        out_NV,
        rows.token_N,
        loss.behaviour_logprob_N,
        loss.advantage_N,
        loss.weight_N,
        loss.ref_logprob_N,
        loss.importance_weight_N,
        *into,
        row_max_N,
        sum_exp_N,
        rows.temperature,
        loss.kl_coef,
        loss.entropy_coef,
        loss.grad_scale,
        rows.softcap or 1.0,
        loss.clip_low,
        loss.clip_high,
        loss.dual_clip or 0.0,
        loss.log_ratio_limit,
        rows.ignore_index,
        at.start,
        *x_NV.shape,
        x_NV.stride(0),
        0 if out_NV is None else out_NV.stride(0),
        rows.token_N.numel(),
    )
    _launch(
        policy_loss_kernels.policy_loss_kernel,
        x_NV,
        out_NV,
        arguments,
        config,
        KL_KIND=loss.kl_kind,
        KL_COEF_ON_DEVICE=isinstance(loss.kl_coef, Tensor),
        ENTROPY_COEF_ON_DEVICE=isinstance(loss.entropy_coef, Tensor),
        GRAD_SCALE_ON_DEVICE=isinstance(loss.grad_scale, Tensor),
        HAS_ENTROPY=loss.has_entropy,
        HAS_DUAL_CLIP=loss.dual_clip is not None,
        TERMS=TERMS,
        **_kinds(rows),
    )


def loss_totals(
    rows: RowArguments, loss: LossArguments, into: LossRows
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KL of each token and the vector of PolicyMetrics, once all rows are computed."""
    total, vector = sum_rows(into.term_MN, maximum=RATIO_MAX)
    return total, into.kl_N, vector


def score_tokens(
    x_NV: Tensor,
    ref_NV: Tensor,
    rows: RowArguments,
    at: slice,
    into: Scores,
    config: RowConfig | None = None,
) -> None:
    """Write both log-probs, entropy and exact KL of the rows `at` into `into`."""
    x_NV, ref_NV = rows_of(x_NV), rows_of(ref_NV)
    arguments = (
        x_NV,
        ref_NV,
        rows.token_N,
        *into,
        *_common(rows, at, x_NV),
        ref_NV.stride(0),
    )
    kernel = score_tokens_kernels.score_tokens_kernel
    config = _config(config, x_NV, pair=True)
    _launch(kernel, x_NV, ref_NV, arguments, config, **_kinds(rows))
