"""A policy loss directly from hidden states: two GEMMs for a frozen head, and no logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastppo.ops.arguments import (
    IGNORE_INDEX,
    LossArguments,
    RowArguments,
    chosen_backend,
    is_traced,
    live_rows,
    loss_arguments,
    row_arguments,
    stat_dtype,
)
from fastppo.ops.backends import BACKENDS, Statistics, TokenKernels
from fastppo.ops.checks import check_flag
from fastppo.ops.config import HeadLora, PolicyLossConfig
from fastppo.ops.gradient_made import (
    GradientMade,
    LossOutputs,
    donated,
    fake_donated,
    save_settings,
    scaled_donated,
)
from fastppo.ops.head import WEIGHT, Head, HeadArguments, LinearRows, asked, fake_results
from fastppo.ops.losses import POLICY_LOSSES
from fastppo.ops.operands import check_chunk_bytes, logits_dtype_of, operands
from fastppo.ops.policy_loss import PolicyLoss, fake_outputs, sweep, unpack
from fastppo.ops.registered import register
from fastppo.ops.sharded_head import ShardedRows, VocabShard, vocab_shard
from fastppo.ops.surrogate import OwnLoss, filled, sweep_by_token, token_gradient, totals
from fastppo.ops.token_logprobs import empty_statistics
from fastppo.ops.word_blocks import (
    LEAST_TOKENS,
    by_words,
    goes_by_words,
    gradient_memory,
    gradients_by_words,
    logits_fit,
)


def linear_policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    token_N: Tensor,
    behaviour_logprob_N: Tensor | None,
    advantage_N: Tensor,
    weight_N: Tensor,
    *,
    loss: str | OwnLoss = "ppo_clip",
    bias_V: Tensor | None = None,
    head_lora: HeadLora | None = None,
    mask: Tensor | None = None,
    ref_logprob_N: Tensor | None = None,
    importance_weight_N: Tensor | None = None,
    kl_weight_N: Tensor | None = None,
    entropy_weight_N: Tensor | None = None,
    offsets: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
    kl_coef: float | Tensor | None = None,
    entropy_coef: float | Tensor | None = None,
    config: PolicyLossConfig | None = None,
    grad_scale: float | Tensor | None = None,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    ignore_index: int = IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> PolicyLoss:
    r"""A policy loss of the logits h W^T + bias, in units of the advantage, without storing them.

        loss = sum_i w_i u_i L_i + w^kl_i kl_coef k_i - w^H_i entropy_coef H_i

    L is one of `fastppo.ops.losses`, or the caller's own function of log-probs and entropies. The
    gradient is computed in the forward, chunk by chunk. Number of GEMMs of N x V x D:

                                        frozen head   bias or adapter trains   weight trains
        a loss by token, or the caller's     2                  2                    3
        gspo, gspo_token                     2                  3                    4 (3)
        the same with an entropy bonus       3                  3                    4 (3)
        without gradient                     1

    (3) is where the logits fit in the memory of the weight's gradient, see `linear_token_logprobs`.
    On a CPU in 16 bits all losses of a trained weight take 4 where they do not: less memory.

    Under torch.autocast operands are cast as `nn.Linear` casts them.

    Args:
        hidden_ND: float (..., D); differentiable. N stands for the tokens' shape, whatever it is.
        weight_VD: float (V, D), of the same dtype unless autocast makes it so; its gradient is
            computed only if it needs one.
        token_N: int64 (...), sampled tokens in [0, V), or `ignore_index`.
        behaviour_logprob_N: float (...), their log-probs under the policy that sampled; None is
            on-policy, where every ratio is 1.
        advantage_N: float (...).
        weight_N: float (...); mask and aggregation in one, see `fastppo.ops.losses.weights`.
        loss: a name of `fastppo.ops.losses.POLICY_LOSSES`, whose settings are those of `config`; or
            a function (logprob_n, entropy_n, rows) -> loss_n of the tokens `rows`, a slice of the N
            tokens. It is called chunk by chunk and returns one loss a token, (n,), never reduced,
            which is differentiated in its first two arguments. Such a call breaks the graph of
            torch.compile.
        bias_V: float (V,).
        head_lora: an adapter on the head, see HeadLora.
        offsets: int32 (B+1,), where each sequence starts; needed by gspo and gspo_token unless the
            tokens are (B, T).
        chunk_bytes, logits_dtype, vocab_size, group, reduce_hidden_grad: as in
            `linear_token_logprobs`; every rank of the group has the whole loss.
        mask, ref_logprob_N, importance_weight_N, kl_weight_N, entropy_weight_N, temperature,
            softcap, logit_scale, kl_coef, entropy_coef, config, grad_scale, check, backend: as in
            `policy_loss`.

    Returns:
        PolicyLoss(loss, logprob_N, entropy_N, kl_N, metrics), float32 (float64 for float64 input).

    Raises:
        ValueError: an unknown loss, shapes or ranks that disagree, a setting out of range, a
            missing reference or offsets, a function whose result is not one loss a token.
        TypeError: inputs of the wrong kind, hidden states and weight of different dtypes.

    Source: as `policy_loss`, and each loss's own.
    """
    op = "linear_policy_loss"
    own = None if isinstance(loss, str) else loss
    name = loss if isinstance(loss, str) else "ppo_clip"
    if name not in POLICY_LOSSES or not (isinstance(loss, str) or callable(loss)):
        raise ValueError(
            f"{op}: loss must be a function or one of {', '.join(POLICY_LOSSES)}, came {loss!r}"
        )
    hidden_ND, head, lead = operands(
        op, hidden_ND, Head(weight_VD, bias_V, head_lora), vocab_size=vocab_size, group=group
    )
    chosen = chosen_backend(op, backend, hidden_ND)
    check_chunk_bytes(op, chunk_bytes)
    if reduce_hidden_grad is not True:
        check_flag(op, "reduce_hidden_grad", reduce_hidden_grad)
    terms = loss_arguments(
        op,
        hidden_ND,
        behaviour_logprob_N=behaviour_logprob_N,
        advantage_N=advantage_N,
        weight_N=weight_N,
        ref_logprob_N=ref_logprob_N,
        importance_weight_N=importance_weight_N,
        kl_weight_N=kl_weight_N,
        entropy_weight_N=entropy_weight_N,
        offsets=offsets,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        config=config,
        grad_scale=grad_scale,
        name=name,
        lead=lead,
    )
    dtype = logits_dtype_of(op, hidden_ND, logits_dtype)
    shard, vocab = None, head.weight_VD.shape[0]
    if group is not None:
        ranks = (group, hidden_ND, head, token_N, vocab_size, reduce_hidden_grad, check)
        settings = {
            "loss": "a function" if own is not None else terms.name,
            "entropy_coef": terms.has_entropy,
            "chunk_bytes": chunk_bytes,
            "logits_dtype": dtype,
        }
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
    )
    enabled = torch.is_grad_enabled()
    tensors = (hidden_ND, *head.tensors())
    wanted = tuple(enabled and tensor is not None and tensor.requires_grad for tensor in tensors)
    given = Arguments(hidden_ND, head.arguments(), rows, terms, dtype, chunk_bytes, wanted, chosen)
    if own is not None:
        # Not a decorator: that would import torch's compiler with every import of fastppo.ops.
        call = _eager
        if torch.compiler.is_compiling():
            call = torch.compiler.disable(_eager)  # type: ignore[no-untyped-call]
        return unpack(call(given, tensors, own, shard), lead)
    if is_traced(hidden_ND):
        return unpack(_registered(given).outputs(), lead)
    return unpack(_made(given, tensors, None, shard), lead)


def _made(
    given: Arguments,
    tensors: tuple[Tensor | None, ...],
    own: OwnLoss | None,
    shard: VocabShard | None,
) -> LossOutputs:
    """The loss of an eager call, as a function of the tensors that want a gradient."""
    found = _forward(given, own, shard)
    outputs = found.outputs()
    if any(given.wanted):
        grads = asked(given.wanted, found.gradients())
        outputs = GradientMade.of(
            "linear_policy_loss", outputs, grads, given.loss, given.backend, tensors
        )
    return outputs


def _eager(
    given: Arguments,
    tensors: tuple[Tensor | None, ...],
    own: OwnLoss,
    shard: VocabShard | None,
) -> LossOutputs:
    """`_made` with the caller's own loss, which a registered operator cannot hold."""
    if is_traced(given.hidden_ND):
        raise ValueError(
            "linear_policy_loss: loss=callable needs tensors with values; give a loss's name, or "
            "apply the function to linear_token_logprobs"
        )
    return _made(given, tensors, own, shard)


class Arguments(NamedTuple):
    """Arguments of the registered operator.

    `wanted` says whether gradients of hidden states, weight, bias, A and B are needed.
    """

    hidden_ND: Tensor
    head: HeadArguments
    rows: RowArguments
    loss: LossArguments
    logits_dtype: torch.dtype
    chunk_bytes: int | None
    wanted: tuple[bool, ...]
    backend: str


class Outputs(NamedTuple):
    """Outputs of the registered operator; its gradients are `donated`, and empty if unwanted."""

    loss: Tensor
    logprob_N: Tensor
    entropy_N: Tensor
    kl_N: Tensor
    metrics: Tensor
    d_hidden_ND: Tensor
    d_weight_VD: Tensor
    d_bias_V: Tensor
    d_lora_A_RD: Tensor
    d_lora_B_VR: Tensor

    def outputs(self) -> LossOutputs:
        return LossOutputs(self.loss, self.logprob_N, self.entropy_N, self.kl_N, self.metrics)

    def gradients(self) -> tuple[Tensor, ...]:
        """The gradients in the order of `wanted`."""
        head = (self.d_weight_VD, self.d_bias_V, self.d_lora_A_RD, self.d_lora_B_VR)
        return (self.d_hidden_ND, *head)


def _forward(a: Arguments, own: OwnLoss | None = None, shard: VocabShard | None = None) -> Outputs:
    head, live_N = Head.of(a.head).detach(), live_rows(a.rows, a.loss.weight_N)
    hidden_ND, stat = a.hidden_ND.detach(), stat_dtype(a.hidden_ND)
    trained, by_sequence = a.wanted[WEIGHT], a.loss.by_sequence
    many = hidden_ND.shape[0] >= LEAST_TOKENS and shard is None and own is None
    words = many and goes_by_words(a, trained=trained)
    # A trained weight's logits lie where its gradient will, until the loss is known. Where they do
    # not fit they are made twice in 16 bits: chunks of rows would add up that gradient in float32.
    fits = words and logits_fit(hidden_ND)
    by_head = words and trained and (fits or hidden_ND.dtype != torch.float32)
    memory_VD = gradient_memory(head.weight_VD) if by_head else None
    given = (hidden_ND, head, stat, a.logits_dtype, a.chunk_bytes, live_N, a.wanted, memory_VD)
    chunks = LinearRows(*given) if shard is None else ShardedRows(*given, shard=shard)
    # Where the hidden states alone want a gradient, that of a log-prob does not depend on the loss.
    by_slope = (words or by_sequence) and not any(a.wanted[1:])
    by_slope = by_slope and not (a.wanted[0] and a.loss.has_entropy)
    at_words = words and (by_slope or by_head)
    kernels = BACKENDS[a.backend] if shard is None else shard.kernels(a.rows, a.backend)
    need_grad = any(a.wanted)
    if own is None and not at_words and not (by_slope and by_sequence and need_grad):
        parts = None if shard is None else kernels
        outputs = sweep(chunks, a.rows, a.loss, hidden_ND, need_grad, a.backend, parts)
        return Outputs(*outputs, *chunks.results())
    stats, terms = empty_statistics(hidden_ND, a.backend), (a.rows, a.loss)
    if own is not None:
        found = sweep_by_token(kernels, chunks, *terms, stats, need_grad, own)
    elif at_words:
        found = _sweep_by_words(chunks, *terms, stats, memory_VD if fits else None)
    else:
        found = _sweep_by_slope(kernels, chunks, *terms, stats)
    total, kl_N, metrics = found
    outputs = LossOutputs(total, stats.logprob_N, stats.entropy_N, kl_N, metrics)
    return Outputs(*outputs, *chunks.results())


def _sweep_by_slope(
    kernels: TokenKernels,
    chunks: LinearRows,
    rows: RowArguments,
    loss: LossArguments,
    stats: Statistics,
) -> tuple[Tensor, Tensor, Tensor]:
    """`totals` of any loss without entropy, of which only the hidden states want a gradient.

    d logprob / d hidden does not depend on the loss, so one pass makes it beside the log-probs, and
    g is multiplied in at the end. In the slope's dtype nothing underflows: it is of order 1.
    """
    weight_N, slope_ND = loss.weight_N, chunks.grads[0]
    assert slope_ND is not None
    live_N, one_N = live_rows(rows, weight_N), torch.ones_like(stats.logprob_N)
    for at, x_NV, dx_NV in chunks.made(slope_ND.dtype):
        assert dx_NV is not None
        kernels.token_logprobs(x_NV, rows, at, stats, weight_N)
        kernels.token_logprobs_backward(x_NV, dx_NV, rows, at, stats, one_N, None, weight_N)
        chunks.to_hidden(dx_NV, slope_ND[at])
    whole = filled(loss, live_N, stats.logprob_N.dtype)
    _multiply(slope_ND, whole, live_N, stats)
    return totals(whole, live_N, stats.logprob_N, stats.entropy_N)


def _sweep_by_words(
    chunks: LinearRows,
    rows: RowArguments,
    loss: LossArguments,
    stats: Statistics,
    kept_VD: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by blocks of words; of any loss where the weight trains."""
    live_N = live_rows(rows, loss.weight_N)
    rows = rows._replace(token_N=rows.token_N.masked_fill(~live_N, rows.ignore_index))
    slope_ND = None if chunks.wanted[WEIGHT] else chunks.grads[0]
    by_words(chunks, rows, stats, slope_ND, kept_VD)
    whole = filled(loss, live_N, stats.logprob_N.dtype)
    if chunks.wanted[WEIGHT]:
        g_N, h_N = token_gradient(whole, live_N, stats.logprob_N)
        h_N = None if h_N is None else loss.grad_scale * h_N
        gradients_by_words(chunks, rows, stats, loss.grad_scale * g_N, h_N, kept_VD)
    elif slope_ND is not None:
        _multiply(slope_ND, whole, live_N, stats)
    return totals(whole, live_N, stats.logprob_N, stats.entropy_N)


def _multiply(slope_ND: Tensor, loss: LossArguments, live_N: Tensor, stats: Statistics) -> None:
    g_N, _ = token_gradient(loss, live_N, stats.logprob_N)
    torch.mul(slope_ND, (loss.grad_scale * g_N)[:, None], out=slope_ND)


def _forward_donated(a: Arguments) -> Outputs:
    made = _forward(a)
    pairs = zip(a.wanted, made.gradients(), strict=True)
    return Outputs(*made.outputs(), *(donated(x, a.backend) if w else x for w, x in pairs))


def _fake(a: Arguments) -> Outputs:
    pairs = zip(a.wanted, fake_results(a.hidden_ND, Head.of(a.head), a.wanted), strict=True)
    gradients = (fake_donated(x, a.backend) if w else x for w, x in pairs)
    return Outputs(*fake_outputs(a.hidden_ND), *gradients)


def _save(ctx: Any, a: Arguments, outputs: Outputs) -> None:
    save_settings(ctx, a.loss, a.backend)
    ctx.wanted = a.wanted
    ctx.save_for_backward(*outputs.gradients())


def _gradients(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 5
    grads = asked(ctx.wanted, ctx.saved_tensors)
    return scaled_donated(ctx, grads, grad_loss)


_registered = register(
    "linear_policy_loss",
    Arguments,
    Outputs,
    _forward_donated,
    _fake,
    results=1,
    save=_save,
    backward=_gradients,
)
