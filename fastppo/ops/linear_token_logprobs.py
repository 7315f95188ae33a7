"""Log-probs and entropies directly from hidden states; the logits of a batch are never stored."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastppo.ops.arguments import (
    IGNORE_INDEX,
    RowArguments,
    chosen_backend,
    is_traced,
    live_rows,
    once_differentiable,
    row_arguments,
    stat_dtype,
)
from fastppo.ops.backends import BACKENDS, Statistics
from fastppo.ops.checks import check_flag
from fastppo.ops.config import HeadLora
from fastppo.ops.head import Head, HeadArguments, HeadGradients, LinearRows, asked, fake_results
from fastppo.ops.labels import label_logprobs
from fastppo.ops.operands import check_chunk_bytes, logits_dtype_of, operands
from fastppo.ops.registered import register
from fastppo.ops.sharded_head import ShardedRows, VocabShard, vocab_shard
from fastppo.ops.token_logprobs import (
    TokenLogprobs,
    backward_at,
    empty_statistics,
    token_results,
    with_label_logprobs,
)
from fastppo.ops.word_blocks import LEAST_TOKENS, by_words, goes_by_words, gradients_by_words


def linear_token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    token_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    head_lora: HeadLora | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
    entropy_grad: bool = False,
    return_lse: bool = False,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    ignore_index: int = IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> TokenLogprobs:
    r"""`token_logprobs` of the logits h W^T + bias, in nats, without storing them.

    The log-prob is differentiable in the hidden states and in the tensors of the head. Its
    derivative in the hidden state does not depend on the loss:

        J_i = d logprob_i / d hidden_i
            = 1 / tau_i sum_v (1[v = token_i] - p_iv) (1 - tanh^2(x_iv / softcap)) W_v

    (times the slope of `logit_scale`). So with a frozen weight the forward computes J, (N, D),
    chunk by chunk, and the backward multiplies it by the gradient of each log-prob, in float32.
    Number of GEMMs of N x V x D:

        frozen weight, any loss of the log-probs      2
        with entropy_grad                             1 more
        with a trained bias or head_lora              1 more, which computes the logits again
        several labels a row                          1 more, likewise
        trained weight                                4 (`linear_policy_loss` needs 3)
        without gradient                              1

    Under torch.autocast hidden states, weight, bias and adapter are cast as `nn.Linear` casts them;
    gradients come back in the dtypes that were given.
    N stands for the tokens' shape, whatever it is. Give the hidden states of all positions, and
    shifted tokens whose last is ignored: `token = F.pad(input_ids[:, 1:], (0, 1), value=-100)`.

    Args:
        hidden_ND: float (..., D).
        weight_VD: float (V, D), of the same dtype unless autocast makes it so.
        token_N: int64 (...), in [0, V), or `ignore_index`: that row gives 0 and no gradient. Or
            (..., K), several labels a row: log-probs are (..., K) then.
        bias_V: float (V,).
        head_lora: an adapter on the head, see HeadLora.
        mask: bool, or integers 0 and 1, (...): tokens behind it are ignored ones.
        temperature: > 0, a float or a float tensor () or (...).
        softcap: > 0, or None for none.
        logit_scale: > 0, the factor on the logits before their softcap (Cohere's `logit_scale`, 1 /
            Granite's `logits_scaling`); None for none.
        vocab_size: number of words of a padded head: rows of the weight past it are no tokens, and
            their gradient is 0. The weight is not copied. None is V.
        group: ranks that share the vocabulary out in their order; weight, bias and the adapter's B
            are this rank's shard, of any number of words. All else is the same on every rank, and
            so must the loss be. Tokens are ids of the whole vocabulary. Eager only, experimental.
        reduce_hidden_grad: whether the gradient of hidden states is summed over the group. If not,
            it is this rank's part, for hidden states whose own backward adds up the parts.
        entropy_grad: whether the entropy is differentiable; if not, it is detached.
        return_lse: whether to give log sum exp of the scaled, capped and tempered logits too.
        chunk_bytes: largest number of bytes of logits at a time; their gradient takes as many with
            entropy_grad, and half as many if float32 logits are those of 16-bit operands. None is
            the device's default.
        logits_dtype: dtype of the GEMM's result. None is float32 for 16-bit operands, and otherwise
            their dtype. The operands' own 16 bits are faster where the memory of the logits counts,
            and round them: of bfloat16 a log-prob is off by 5e-3 to 1e-2, and a ratio by as much.
        check: whether to check the range of tokens, which waits for the device.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        TokenLogprobs(logprob_N, entropy_N, lse_N), float32 (float64 for float64 hidden states).

    Raises:
        ValueError: shapes or ranks differ, a setting is out of range, a backend cannot run.
        TypeError: inputs of the wrong kind, hidden states and weight of different dtypes.
    """
    op = "linear_token_logprobs"
    hidden_ND, head, lead = operands(
        op, hidden_ND, Head(weight_VD, bias_V, head_lora), vocab_size=vocab_size, group=group
    )
    chosen = chosen_backend(op, backend, hidden_ND)
    check_flag(op, "entropy_grad", entropy_grad)
    check_flag(op, "return_lse", return_lse)
    if reduce_hidden_grad is not True:
        check_flag(op, "reduce_hidden_grad", reduce_hidden_grad)
    check_chunk_bytes(op, chunk_bytes)
    dtype, enabled = logits_dtype_of(op, hidden_ND, logits_dtype), torch.is_grad_enabled()
    shard, vocab = None, head.weight_VD.shape[0]
    if group is not None:
        ranks = (group, hidden_ND, head, token_N, vocab_size, reduce_hidden_grad, check)
        settings = {"entropy_grad": entropy_grad, "chunk_bytes": chunk_bytes, "logits_dtype": dtype}
        head, shard = vocab_shard(op, *ranks, settings)
        vocab = shard.vocab
    rows = row_arguments(
        op,
        token_N,
        hidden_ND,
        vocab,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        check=check,
        lead=lead,
        mask=mask,
        logit_scale=logit_scale,
        labels=True,
    )
    tensors = (hidden_ND, *head.tensors())
    wanted = tuple(enabled and tensor is not None and tensor.requires_grad for tensor in tensors)
    given = Arguments(
        hidden_ND, head.arguments(), rows, dtype, chunk_bytes, entropy_grad, wanted, chosen
    )
    if is_traced(hidden_ND):
        found = _registered(given)
    elif any(wanted):
        found = _LinearTokenLogprobs.apply(*tensors, given, return_lse, shard)  # type: ignore[no-untyped-call]
    else:
        found = _forward(given, shard)
    logprob_N, entropy_N, *rest = found
    entropy_N = entropy_N if entropy_grad else entropy_N.detach()
    return token_results(rows, (logprob_N, entropy_N, *rest), lead, return_lse)


class Arguments(NamedTuple):
    """Arguments of the registered operator; `wanted` is for hidden states, weight, bias, A, B."""

    hidden_ND: Tensor
    head: HeadArguments
    rows: RowArguments
    logits_dtype: torch.dtype
    chunk_bytes: int | None
    entropy_grad: bool
    wanted: tuple[bool, ...]
    backend: str

    @property
    def by_slope(self) -> bool:
        """Whether the forward computes the gradient of the hidden states."""
        hidden, weight, *_ = self.wanted
        return hidden and not weight and self.rows.labels_NK is None


class Outputs(NamedTuple):
    """Results of the registered operator: statistics, and slopes, which may be empty."""

    logprob_N: Tensor  # (N, K) with several labels a row
    entropy_N: Tensor
    row_max_N: Tensor
    sum_exp_N: Tensor
    logprob_slope_ND: Tensor  # d logprob_i / d hidden_i
    entropy_slope_ND: Tensor


class BackwardArguments(NamedTuple):
    """Arguments of the backward; `wanted` is for hidden states, weight, bias, A and B."""

    g_N: Tensor | None
    h_N: Tensor | None
    wanted: tuple[bool, ...]
    hidden_ND: Tensor
    head: HeadArguments
    rows: RowArguments
    logits_dtype: torch.dtype
    chunk_bytes: int | None
    stats: Statistics
    backend: str


def _chunks(
    a: Arguments | BackwardArguments, wanted: tuple[bool, ...], shard: VocabShard | None
) -> LinearRows:
    head = Head.of(a.head).detach()
    live_N = live_rows(a.rows) if any(wanted) else None
    hidden_ND, stat = a.hidden_ND.detach(), stat_dtype(a.hidden_ND)
    given = (hidden_ND, head, stat, a.logits_dtype, a.chunk_bytes, live_N, wanted)
    return LinearRows(*given) if shard is None else ShardedRows(*given, shard=shard)


def _forward(a: Arguments, shard: VocabShard | None = None) -> Outputs:
    stats = empty_statistics(a.hidden_ND, a.backend)
    kernels = BACKENDS[a.backend] if shard is None else shard.kernels(a.rows, a.backend)
    slopes = _empty_slopes(a)
    chunks = _chunks(a, (False,) * 5, shard)
    words = a.hidden_ND.shape[0] >= LEAST_TOKENS and not (a.by_slope and a.entropy_grad)
    if words and goes_by_words(chunks, a.rows, a.backend):
        by_words(chunks, a.rows, stats, slopes[0] if a.by_slope else None)
        return Outputs(*stats, *slopes)
    if not a.by_slope:
        labelled = with_label_logprobs(stats, a.rows)

        def kernel(at: slice, x_NV: Tensor, _: Tensor | None) -> None:
            kernels.token_logprobs(x_NV, a.rows, at, stats if shard is None else labelled)
            if a.rows.labels_NK is not None and shard is None:
                labelled.logprob_N[at] = label_logprobs(x_NV, a.rows, at, stats)

        chunks.visit(kernel, write=False)
        return Outputs(*labelled, *slopes)
    one_N = torch.ones_like(stats.logprob_N)
    # Only the last one may overwrite the logits.
    derived: list[tuple[Tensor, Tensor | None, Tensor | None]] = [(slopes[0], one_N, None)]
    if a.entropy_grad:
        derived.insert(0, (slopes[1], None, one_N))
    for at, x_NV, dx_NV in chunks.made(a.hidden_ND.dtype, apart=a.entropy_grad):
        assert dx_NV is not None
        kernels.token_logprobs(x_NV, a.rows, at, stats)
        for slope_ND, g_N, h_N in derived:
            kernels.token_logprobs_backward(x_NV, dx_NV, a.rows, at, stats, g_N, h_N)
            chunks.to_hidden(dx_NV, slope_ND[at])
    return Outputs(*stats, *slopes)


def _empty_slopes(a: Arguments) -> tuple[Tensor, Tensor]:
    """Memory for d logprob / d hidden and d entropy / d hidden; empty if not wanted."""
    shape, like = a.hidden_ND.shape, a.hidden_ND
    return (
        like.new_empty(shape if a.by_slope else 0),
        like.new_empty(shape if a.by_slope and a.entropy_grad else 0),
    )


def _backward(a: BackwardArguments, shard: VocabShard | None = None) -> HeadGradients:
    """The wanted gradients; the logits are computed again, by words or chunk by chunk."""
    chunks = _chunks(a, a.wanted, shard)
    kernels = BACKENDS[a.backend] if shard is None else shard.kernels(a.rows, a.backend)
    if a.hidden_ND.shape[0] >= LEAST_TOKENS and goes_by_words(chunks, a.rows, a.backend):
        gradients_by_words(chunks, a.rows, a.stats, a.g_N, a.h_N)
        return chunks.results()
    gradient = partial(backward_at, kernels) if shard is None else kernels.token_logprobs_backward

    def kernel(at: slice, x_NV: Tensor, out_NV: Tensor | None) -> None:
        assert out_NV is not None
        gradient(x_NV, out_NV, a.rows, at, a.stats, a.g_N, a.h_N)

    chunks.visit(kernel, write=True)
    return chunks.results()


def _save(ctx: Any, a: Arguments, found: Outputs) -> None:
    rows, head, tau = a.rows, a.head, a.rows.temperature
    ctx.softcap, ctx.ignore_index, ctx.scaling = rows.softcap, rows.ignore_index, head.lora_scaling
    ctx.logits_dtype, ctx.chunk_bytes, ctx.backend = a.logits_dtype, a.chunk_bytes, a.backend
    ctx.by_slope, ctx.entropy_grad = a.by_slope, a.entropy_grad
    # Without these the backward cannot compute the logits again; with slopes it need not.
    again = not a.by_slope or any(a.wanted[1:])
    by_tensor = isinstance(tau, Tensor)  # autograd saves tensors
    ctx.temperature = None if by_tensor else tau
    operands = (a.hidden_ND, head.weight_VD, head.bias_V, head.lora_A_RD, head.lora_B_VR)
    ctx.save_for_backward(
        rows.token_N,
        rows.labels_NK,
        tau if by_tensor else None,
        *(operands if again else (None,) * len(operands)),
        *found,
    )


def _gradients(ctx: Any, g_N: Tensor | None, h_N: Tensor | None) -> tuple[Tensor | None, ...]:
    token_N, labels_NK, tau, hidden_ND, weight_VD, bias_V, a_RD, b_VR, *found = ctx.saved_tensors
    tau = ctx.temperature if tau is None else tau
    rows = RowArguments(token_N, tau, ctx.softcap, ctx.ignore_index, labels_NK)
    outputs = Outputs(*found)
    wanted = tuple(bool(needed) for needed in ctx.needs_input_grad[:5])
    grads: tuple[Tensor | None, ...] = (None,) * 5
    h_N = h_N if ctx.entropy_grad else None
    d_hidden_ND = None
    if ctx.by_slope and wanted[0]:
        d_hidden_ND = _times_slopes(rows, outputs, g_N, h_N)
        wanted = (False, *wanted[1:])
    if any(wanted):
        given = BackwardArguments(
            g_N,
            h_N,
            wanted,
            hidden_ND,
            HeadArguments(weight_VD, bias_V, a_RD, b_VR, ctx.scaling),
            rows,
            ctx.logits_dtype,
            ctx.chunk_bytes,
            Statistics(*outputs[:4]),
            ctx.backend,
        )
        shard = getattr(ctx, "shard", None)
        made = _registered_backward(given) if is_traced(hidden_ND) else _backward(given, shard)
        grads = asked(wanted, made)
    return grads if d_hidden_ND is None else (d_hidden_ND, *grads[1:])


def _times_slopes(
    rows: RowArguments, found: Outputs, g_N: Tensor | None, h_N: Tensor | None
) -> Tensor | None:
    """g dlogprob/dhidden + h dentropy/dhidden in float32, cast to the dtype of the slopes."""
    # The slopes of ignored rows are 0, but 0 times a NaN in their gradient is NaN.
    dead_N = ~live_rows(rows)
    products = [
        slope_ND * grad_N.masked_fill(dead_N, 0)[:, None]
        for slope_ND, grad_N in ((found.logprob_slope_ND, g_N), (found.entropy_slope_ND, h_N))
        if grad_N is not None
    ]
    if not products:
        return None
    return sum(products[1:], products[0]).to(found.logprob_slope_ND.dtype)


class _LinearTokenLogprobs(torch.autograd.Function):
    """The eager call, without torch.library's cost."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        lora_A_RD: Tensor | None,
        lora_B_VR: Tensor | None,
        a: Arguments,
        with_statistics: bool,
        shard: VocabShard | None,
    ) -> tuple[Tensor, ...]:
        found = _forward(a, shard)
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        _save(ctx, a, found)
        if not with_statistics:
            return found.logprob_N, found.entropy_N
        ctx.mark_non_differentiable(found.row_max_N, found.sum_exp_N)
        return tuple(found[:4])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_N: Tensor | None, h_N: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, g_N, h_N), None, None, None)


_registered = register(
    "linear_token_logprobs",
    Arguments,
    Outputs,
    _forward,
    lambda a: Outputs(
        *with_label_logprobs(empty_statistics(a.hidden_ND, a.backend), a.rows), *_empty_slopes(a)
    ),
    results=2,
    save=_save,
    backward=_gradients,
)
_registered_backward = register(
    "linear_token_logprobs_backward",
    BackwardArguments,
    HeadGradients,
    _backward,
    lambda a: fake_results(a.hidden_ND, Head.of(a.head), a.wanted),
)
