"""Log-probs of sampled tokens, and entropies of their distributions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.ops.arguments import (
    IGNORE_INDEX,
    RowArguments,
    chosen_backend,
    is_traced,
    live_rows,
    once_differentiable,
    row_arguments,
    rows_and_lead,
    stat_dtype,
)
from fastppo.ops.backends import BACKENDS, Statistics, TokenKernels
from fastppo.ops.checks import check_flag
from fastppo.ops.labels import LabelGradient, for_kernels, label_logprobs, log_sum_exp
from fastppo.ops.registered import register
from fastppo.ops.shapes import first_words, in_shape
from fastppo.ops.workspace import fresh_like


class TokenLogprobs(NamedTuple):
    """Log-probs of the sampled tokens and entropies, in nats and in the tokens' shape; 0 on ignored
    ones. `lse_N` is given where it was asked for: log sum exp z of each row, without gradient.
    """

    logprob_N: Tensor
    entropy_N: Tensor
    lse_N: Tensor | None = None


def token_logprobs(
    logits_NV: Tensor,
    token_N: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    return_lse: bool = False,
    ignore_index: int = IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> TokenLogprobs:
    r"""Log-prob of each sampled token and entropy of each row, in nats; both differentiable.

        z = softcap tanh(logit_scale x / softcap) / temperature
        logprob = z[token] - log sum exp z,    entropy = - sum p log p

    A loss can be built from these two; its gradient reaches the logits. N stands for the tokens'
    shape, whatever it is: (B, T) logits are (B, T, V).

    The token after a position is what its logits are of. Give all logits and shifted tokens, whose
    last is ignored: `token = F.pad(input_ids[:, 1:], (0, 1), value=-100)`. `logits[:, :-1]` is the
    same and no view of rows, so it would be copied.

    Args:
        logits_NV: float (..., V), any strides; -inf is masked vocabulary.
        token_N: int64 (...), in [0, V), or `ignore_index`: that row is not read, gives 0 and no
            gradient. Or (..., K), several labels a row (distillation from a teacher's top K):
            log-probs are (..., K) then, from one sweep over the logits.
        mask: bool, or integers 0 and 1, (...): tokens behind it are ignored ones. It takes the
            place of packing.
        temperature: > 0, a float or a float tensor () or (...); no gradient flows to it.
        softcap: > 0, or None for none.
        logit_scale: > 0, the factor on the logits before their softcap (Cohere's `logit_scale`, 1 /
            Granite's `logits_scaling`); None for none.
        vocab_size: number of words of a padded head: columns past it are no tokens. Their gradient
            is 0, and costs one more pass over the gradient. None is V.
        return_lse: whether to give log sum exp z too.
        check: whether to check the range of tokens, which waits for the device.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        TokenLogprobs(logprob_N, entropy_N, lse_N), float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes that disagree, a setting out of range, a backend that cannot run.
        TypeError: logits that are not floating point, tokens that are not integers.
    """
    op = "token_logprobs"
    logits_NV, lead = rows_and_lead(op, "logits_NV", logits_NV)
    if vocab_size is not None:
        logits_NV = first_words(op, logits_NV, vocab_size)
    chosen = chosen_backend(op, backend, logits_NV)
    if return_lse is not False:
        check_flag(op, "return_lse", return_lse)
    rows = row_arguments(
        op,
        token_N,
        logits_NV,
        logits_NV.shape[1],
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        check=check,
        lead=lead,
        mask=mask,
        logit_scale=logit_scale,
        labels=True,
    )
    given = Arguments(logits_NV, rows, chosen)
    if is_traced(logits_NV):
        found = _registered(given)
    elif logits_NV.requires_grad and torch.is_grad_enabled():
        found = _TokenLogprobs.apply(logits_NV, given, return_lse)  # type: ignore[no-untyped-call]
    else:
        found = _forward(given)
    if len(lead) == 1 and not return_lse:
        return TokenLogprobs(found[0], found[1])
    return token_results(rows, found, lead, return_lse)


def token_results(
    rows: RowArguments, found: tuple[Tensor, ...], lead: torch.Size, return_lse: bool
) -> TokenLogprobs:
    """The public result of log-probs, entropies and, for lse, row_max and sum_exp."""
    logprob_N, entropy_N, *rest = found
    lse_N = log_sum_exp(rows, rest[0], rest[1]) if return_lse else None
    if len(lead) == 1:
        return TokenLogprobs(logprob_N, entropy_N, lse_N)
    return TokenLogprobs(
        in_shape(logprob_N, lead),
        in_shape(entropy_N, lead),
        None if lse_N is None else in_shape(lse_N, lead),
    )


class Arguments(NamedTuple):
    """Arguments of the registered operator."""

    logits_NV: Tensor
    rows: RowArguments
    backend: str


class BackwardArguments(NamedTuple):
    """Arguments of the registered operator's backward."""

    g_N: Tensor | None
    h_N: Tensor | None
    logits_NV: Tensor
    rows: RowArguments
    stats: Statistics
    backend: str


class Gradient(NamedTuple):
    """The result of the backward."""

    grad_NV: Tensor


def empty_statistics(like: Tensor, backend: str) -> Statistics:
    """Uninitialised, for the rows of `like`; results of a registered op share no memory."""
    n, dtype = like.shape[0], stat_dtype(like)
    return Statistics(
        like.new_empty(n, dtype=dtype),
        like.new_empty(n, dtype=dtype),
        like.new_empty(n, dtype=dtype),
        like.new_empty(n, dtype=dtype),
    )


def with_label_logprobs(stats: Statistics, rows: RowArguments) -> Statistics:
    """With several labels a row, memory for their log-probs in place of (N,)."""
    if rows.labels_NK is None:
        return stats
    return stats._replace(logprob_N=stats.entropy_N.new_empty(rows.labels_NK.shape))


def _forward(a: Arguments) -> Statistics:
    stats = empty_statistics(a.logits_NV, a.backend)
    everything = slice(0, a.logits_NV.shape[0])
    BACKENDS[a.backend].token_logprobs(a.logits_NV, a.rows, everything, stats)
    if a.rows.labels_NK is None:
        return stats
    logits_NV = a.logits_NV.detach()
    return stats._replace(logprob_N=label_logprobs(logits_NV, a.rows, everything, stats))


def _backward(a: BackwardArguments) -> Gradient:
    """The gradient of the logits, in one pass; nothing else of size N x V is allocated."""
    grad_NV = fresh_like(a.logits_NV, beside=a.backend == "triton")
    everything = slice(0, a.logits_NV.shape[0])
    kernels, rows, x_NV = BACKENDS[a.backend], a.rows, a.logits_NV
    backward_at(kernels, x_NV, grad_NV, rows, everything, a.stats, a.g_N, a.h_N)
    return Gradient(grad_NV)


def backward_at(
    kernels: TokenKernels,
    x_NV: Tensor,
    out_NV: Tensor,
    rows: RowArguments,
    at: slice,
    stats: Statistics,
    g_N: Tensor | None,
    h_N: Tensor | None,
) -> None:
    """The gradient of the rows `at` into `out_NV`, which may be `x_NV`; g_N may be (N, K)."""
    if rows.labels_NK is None:
        kernels.token_logprobs_backward(x_NV, out_NV, rows, at, stats, g_N, h_N)
        return
    labels = None if g_N is None else LabelGradient.of(x_NV, rows, at, stats.logprob_N, g_N)
    g_N = None if labels is None else labels.g_N
    kernels.token_logprobs_backward(x_NV, out_NV, rows, at, for_kernels(stats), g_N, h_N)
    if labels is not None:
        labels.add_to(out_NV)


def times_slopes(
    rows: RowArguments, slopes_ND: tuple[Tensor, ...], grads_N: tuple[Tensor | None, ...]
) -> Tensor | None:
    """g dlogprob/dhidden + h dentropy/dhidden in float32, cast to the dtype of the slopes."""
    # The slopes of ignored rows are 0, but 0 times a NaN in their gradient is NaN.
    dead_N = ~live_rows(rows)
    products = [
        slope_ND * grad_N.masked_fill(dead_N, 0)[:, None]
        for slope_ND, grad_N in zip(slopes_ND, grads_N, strict=True)
        if grad_N is not None
    ]
    if not products:
        return None
    return sum(products[1:], products[0]).to(slopes_ND[0].dtype)


def _save(ctx: Any, a: Arguments, stats: Statistics) -> None:
    rows, tau = a.rows, a.rows.temperature
    ctx.softcap, ctx.ignore_index, ctx.backend = rows.softcap, rows.ignore_index, a.backend
    by_tensor = isinstance(tau, Tensor)  # autograd saves tensors
    ctx.temperature = None if by_tensor else tau
    ctx.save_for_backward(
        a.logits_NV, rows.token_N, rows.labels_NK, tau if by_tensor else None, *stats
    )


def _gradients(ctx: Any, g_N: Tensor | None, h_N: Tensor | None) -> tuple[Tensor | None]:
    logits_NV, token_N, labels_NK, tau, *stats = ctx.saved_tensors
    tau = ctx.temperature if tau is None else tau
    rows = RowArguments(token_N, tau, ctx.softcap, ctx.ignore_index, labels_NK)
    given = BackwardArguments(g_N, h_N, logits_NV, rows, Statistics(*stats), ctx.backend)
    backward = _registered_backward if is_traced(logits_NV) else _backward
    return (backward(given).grad_NV,)


class _TokenLogprobs(torch.autograd.Function):
    """Used by eager calls, because torch.library costs more than the kernel."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, a: Arguments, with_statistics: bool
    ) -> tuple[Tensor, ...]:
        stats = _forward(a)
        ctx.set_materialize_grads(False)
        _save(ctx, a, stats)
        if not with_statistics:
            return stats.logprob_N, stats.entropy_N
        ctx.mark_non_differentiable(*stats[2:])
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_N: Tensor | None, h_N: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, g_N, h_N), None, None)


_registered = register(
    "token_logprobs",
    Arguments,
    Statistics,
    _forward,
    lambda a: with_label_logprobs(empty_statistics(a.logits_NV, a.backend), a.rows),
    results=2,
    save=_save,
    backward=_gradients,
)
_registered_backward = register(
    "token_logprobs_backward",
    BackwardArguments,
    Gradient,
    _backward,
    lambda a: Gradient(
        torch.empty_like(a.logits_NV, memory_format=torch.contiguous_format),
    ),
)
