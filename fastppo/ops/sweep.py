"""How a backend goes over rows of logits: statistics, gradients, PPO's loss.

`Rows` says whether they lie in memory or are made chunk by chunk; what is done with a chunk is a
Triton launch, a call of the C++ library, or the definition block by block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops import checks, outputs
from fastppo.ops.arguments import LossArguments, RowArguments
from fastppo.ops.backend import row_kernels
from fastppo.ops.rows import (
    ChunkKernel,
    Rows,
    gradient,
    in_blocks,
    row_outputs,
    statistics,
)
from fastppo.ops.surrogate import token_gradient, totals

# Log-prob, entropy, and what a backend keeps for its backward.
Statistics = tuple[Tensor, Tensor, Tensor, Tensor]

# Loss, log-prob, entropy, KL, and the vector of metrics.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def statistics_kernel(
    rows: RowArguments, live_N: Tensor, dtype: torch.dtype, into: Statistics
) -> ChunkKernel:
    """The definition's chunk kernel that fills in log-prob and entropy."""
    spec = rows.spec(live_N, dtype)

    def visitor(at: slice, x: Tensor) -> None:
        found = statistics(x, spec.at(at))
        into[0][at], into[1][at] = found.logprob, found.entropy

    return in_blocks(visitor, dtype)


def gradient_kernel(
    rows: RowArguments, live_N: Tensor, dtype: torch.dtype, g_N: Tensor | None, h_N: Tensor | None
) -> ChunkKernel:
    """The definition's chunk kernel that gives the gradient for those of log-prob and entropy."""
    spec = rows.spec(live_N, dtype)

    def visitor(at: slice, x: Tensor) -> Tensor:
        here = spec.at(at)
        stats = statistics(x, here)
        g = torch.zeros_like(stats.logprob) if g_N is None else g_N[at]
        return gradient(stats, here, g, None if h_N is None else h_N[at])

    return in_blocks(visitor, dtype)


def visit_statistics(
    visited: Rows,
    rows: RowArguments,
    like: Tensor,
    backend: str,
    *,
    live_N: Tensor,
    weight_N: Tensor | None = None,
) -> Statistics:
    """Log-prob and entropy of every row, and what the backward of this backend needs again."""
    n = rows.token_N.numel()
    if backend != "torch":
        kernels = row_kernels(backend)
        into = outputs.empty_statistics(n, like.device)
        visited.visit(
            lambda at, x, _: kernels.token_logprobs(x, rows, at, into, weight_N), write=False
        )
        return into.logprob_N, into.entropy_N, into.highest_N, into.total_N
    dtype = checks.stat_dtype(like)
    logprob_N, entropy_N = row_outputs(like, n, dtype)
    nothing = (logprob_N.new_empty(0), logprob_N.new_empty(0))  # the definition starts again
    into_torch = (logprob_N, entropy_N, *nothing)
    visited.visit(statistics_kernel(rows, live_N, dtype, into_torch), write=False)
    return into_torch


def visit_gradient(
    visited: Rows,
    rows: RowArguments,
    like: Tensor,
    backend: str,
    stats: Statistics,
    g_N: Tensor | None,
    h_N: Tensor | None,
    *,
    live_N: Tensor,
    weight_N: Tensor | None = None,
) -> None:
    """The gradient of every row for those of its log-prob and entropy."""
    if backend != "torch":
        kernels = row_kernels(backend)
        into = outputs.Statistics(*stats)

        def kernel(at: slice, x: Tensor, out: Tensor | None) -> None:
            assert out is not None
            kernels.token_logprobs_backward(x, out, rows, at, into, g_N, h_N, weight_N)

        visited.visit(kernel, write=True)
        return
    visited.visit(gradient_kernel(rows, live_N, checks.stat_dtype(like), g_N, h_N), write=True)


def sweep(
    rows: Rows, arguments: LossArguments, like: Tensor, need_grad: bool, backend: str
) -> Outputs:
    """Visit all rows; the gradient, if wanted, goes where `rows` keeps it.

    A token's loss is its own, so one visit gives statistics and gradient. A ratio by sequence needs
    all of its tokens' log-probs first: a visit for those, then one for the gradient.
    """
    if arguments.by_sequence:
        return _sweep_by_sequence(rows, arguments, like, need_grad, backend)
    if backend != "torch":
        kernels = row_kernels(backend)
        into = outputs.empty_policy_outputs(arguments.rows.token_N.numel(), like.device)
        rows.visit(
            lambda at, x, out: kernels.policy_loss(x, out, arguments, at, into), write=need_grad
        )
        loss, metrics = kernels.sum_rows(into.term_MN, maximum=outputs.RATIO_MAX)
        return loss, into.logprob_N, into.entropy_N, into.kl_N, metrics
    dtype = checks.stat_dtype(like)
    spec, inputs = arguments.prepare(dtype)
    logprob_N, entropy_N = row_outputs(like, spec.token_N.numel(), dtype)
    scale = arguments.scale

    def visitor(at: slice, x: Tensor) -> Tensor | None:
        here = spec.at(at)
        stats = statistics(x, here)
        logprob_N[at], entropy_N[at] = stats.logprob, stats.entropy
        if not need_grad:
            return None
        g, h = token_gradient(inputs.at(at), stats.logprob)
        return gradient(stats, here, scale * g, None if h is None else scale * h)

    rows.visit(in_blocks(visitor, dtype), write=need_grad)
    loss, kl_N, metrics = totals(inputs, logprob_N, entropy_N)
    return loss, logprob_N, entropy_N, kl_N, metrics


def _sweep_by_sequence(
    rows: Rows, arguments: LossArguments, like: Tensor, need_grad: bool, backend: str
) -> Outputs:
    _, inputs = arguments.prepare(checks.stat_dtype(like))
    which: dict[str, Tensor] = {"live_N": inputs.live_N, "weight_N": arguments.weight_N}
    stats = visit_statistics(rows, arguments.rows, like, backend, **which)
    if need_grad:
        g_N, h_N = token_gradient(inputs, stats[0])
        scale = arguments.scale
        h_N = None if h_N is None else scale * h_N
        visit_gradient(rows, arguments.rows, like, backend, stats, scale * g_N, h_N, **which)
    loss, kl_N, metrics = totals(inputs, stats[0], stats[1])
    return loss, stats[0], stats[1], kl_N, metrics
