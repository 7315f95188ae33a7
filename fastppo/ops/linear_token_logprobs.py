"""Log-probs and entropies directly from hidden states; the logits of a batch are never stored."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastppo.ops.arguments import (
    IGNORE_INDEX,
    RowArguments,
    chosen_backend,
    is_traced,
    once_differentiable,
    row_arguments,
)
from fastppo.ops.backends import Statistics
from fastppo.ops.checks import check_flag
from fastppo.ops.config import HeadLora
from fastppo.ops.head import WEIGHT, Head, HeadArguments, HeadGradients, asked, fake_results
from fastppo.ops.linear_passes import (
    Arguments,
    BackwardArguments,
    Outputs,
    backward,
    empty_outputs,
    forward,
)
from fastppo.ops.operands import check_chunk_bytes, logits_dtype_of, operands
from fastppo.ops.registered import register
from fastppo.ops.sharded_head import VocabShard, vocab_shard
from fastppo.ops.token_logprobs import (
    TokenLogprobs,
    empty_statistics,
    times_slopes,
    token_results,
    with_label_logprobs,
)


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
    keep_logits: bool = True,
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
        trained weight                                4, or 3 with `keep_logits`
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
        keep_logits: whether a trained weight's logits may stay until the backward, in the memory
            that the weight's gradient then takes. They do in an eager call on a CPU if N is at most
            2048 and, rounded up to a multiple of 32, at most D - 16 (D / 2 - 16 in 16 bits, as the
            logits are float32). Give False if many calls wait for one backward.
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
    for name, flag in (("reduce_hidden_grad", reduce_hidden_grad), ("keep_logits", keep_logits)):
        if flag is not True:
            check_flag(op, name, flag)
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
    traced = is_traced(hidden_ND)
    keep = keep_logits and wanted[WEIGHT] and not traced  # a tracer's tensors are not written over
    given = Arguments(
        hidden_ND, head.arguments(), rows, dtype, chunk_bytes, entropy_grad, keep, wanted, chosen
    )
    if traced:
        found = _registered(given)
    elif any(wanted):
        found = _LinearTokenLogprobs.apply(*tensors, given, return_lse, shard)  # type: ignore[no-untyped-call]
    else:
        found = forward(given, shard)
    logprob_N, entropy_N, *rest = found
    entropy_N = entropy_N if entropy_grad else entropy_N.detach()
    return token_results(rows, (logprob_N, entropy_N, *rest), lead, return_lse)


def _save(ctx: Any, a: Arguments, found: Outputs) -> None:
    rows, head, tau = a.rows, a.head, a.rows.temperature
    ctx.softcap, ctx.ignore_index, ctx.scaling = rows.softcap, rows.ignore_index, head.lora_scaling
    ctx.logits_dtype, ctx.chunk_bytes, ctx.backend = a.logits_dtype, a.chunk_bytes, a.backend
    ctx.by_slope, ctx.entropy_grad, ctx.taken = a.by_slope, a.entropy_grad, False
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
        slopes = (outputs.logprob_slope_ND, outputs.entropy_slope_ND)
        d_hidden_ND = times_slopes(rows, slopes, (g_N, h_N))
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
        if is_traced(hidden_ND):
            made = _registered_backward(given)
        else:
            made = backward(given, shard, _kept(ctx, outputs.kept_VD, wanted))
        grads = asked(wanted, made)
    return grads if d_hidden_ND is None else (d_hidden_ND, *grads[1:])


def _kept(ctx: Any, kept_VD: Tensor, wanted: tuple[bool, ...]) -> Tensor | None:
    """The memory with the logits, if there is one and no gradient has taken their place yet."""
    if not kept_VD.numel() or ctx.taken:
        return None  # a second backward computes the logits again
    ctx.taken = wanted[WEIGHT]
    return kept_VD.data  # autograd would take what is written to it for a change of the saved one


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
        found = forward(a, shard)
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
    forward,
    lambda a: Outputs(
        *with_label_logprobs(empty_statistics(a.hidden_ND, a.backend), a.rows), *empty_outputs(a)
    ),
    results=2,
    save=_save,
    backward=_gradients,
)
_registered_backward = register(
    "linear_token_logprobs_backward",
    BackwardArguments,
    HeadGradients,
    backward,
    lambda a: fake_results(a.hidden_ND, Head.of(a.head), a.wanted),
)
