"""PPO's clipped loss from logits; the gradient is computed in the forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.ops.arguments import (
    IGNORE_INDEX,
    LossArguments,
    RowArguments,
    chosen_backend,
    constant,
    is_traced,
    loss_arguments,
    once_differentiable,
    row_arguments,
    rows_and_lead,
    stat_dtype,
)
from fastppo.ops.backends import BACKENDS, LossRows, TokenKernels
from fastppo.ops.checks import check_flag, check_inplace
from fastppo.ops.config import PolicyLossConfig
from fastppo.ops.gradient_made import (
    GradientMade,
    LossOutputs,
    donated,
    fake_donated,
    save_settings,
    scaled,
    scaled_donated,
)
from fastppo.ops.registered import register
from fastppo.ops.rows import ChunkKernel, Chunks
from fastppo.ops.shapes import first_words, in_shape
from fastppo.ops.surrogate import TERMS, PolicyMetrics, sweep_by_sequence, sweep_by_token
from fastppo.ops.token_logprobs import empty_statistics
from fastppo.ops.workspace import fresh_like


class PolicyLoss(NamedTuple):
    """`loss` is a differentiable scalar, the rest is detached; `kl_N` is 0 without a reference."""

    loss: Tensor
    logprob_N: Tensor
    entropy_N: Tensor
    kl_N: Tensor
    metrics: PolicyMetrics


def policy_loss(
    logits_NV: Tensor,
    token_N: Tensor,
    behaviour_logprob_N: Tensor | None,
    advantage_N: Tensor,
    weight_N: Tensor,
    *,
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
    kl_coef: float | Tensor | None = None,
    entropy_coef: float | Tensor | None = None,
    config: PolicyLossConfig | None = None,
    inplace: bool = False,
    grad_scale: float | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> PolicyLoss:
    r"""PPO's loss over packed tokens, KL and entropy included, in units of the advantage.

        rho = exp(clamp(logprob - behaviour, +-limit))
        L   = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))
        L   = min(L, -dual_clip A)  where A < 0
        loss = sum_i w_i u_i L_i + w^kl_i kl_coef k_i - w^H_i entropy_coef H_i

    The weights w_i are mask and aggregation, fixed over the whole optimiser step (token-mean: 1 /
    its live tokens), so splitting a batch into micro-batches changes only rounding.

    Args:
        logits_NV: float (..., V), any strides; -inf is masked vocabulary. The only differentiable
            input. N stands for the tokens' shape, whatever it is.
        token_N: int64 (...), sampled tokens in [0, V), or `ignore_index`, which acts as weight 0.
            Give all logits and shifted tokens, as `token_logprobs` says.
        behaviour_logprob_N: float (...), their log-probs under the policy that sampled; None is
            on-policy, where every ratio is 1.
        advantage_N: float (...).
        weight_N: float (...); rows of weight 0 are neither read nor counted, their gradient is 0.
        mask: bool, or integers 0 and 1, (...): tokens behind it have weight 0.
        ref_logprob_N: float (...), needed if kl_coef is not 0.
        importance_weight_N: float (...), scales the surrogate alone (truncated importance
            sampling).
        kl_weight_N, entropy_weight_N: float (...), weights of the KL and of the entropy; None is
            weight_N. Rows whose weight_N is 0 take no part all the same.
        offsets: int32 (B+1,), where each sequence starts; needed by ratio_level="sequence", unless
            tokens are (B, T): then each row is a sequence.
        temperature: > 0, a float or a float tensor () or (...): the sampling temperature.
        softcap, logit_scale, vocab_size: as in `token_logprobs`.
        kl_coef, entropy_coef: a float or 0-d tensor that replaces the configuration's.
        config: clipping and regularisers; None is PPO's own, PolicyLossConfig(). The kernel of one
            pass has neither weights apart nor the KL's correction and limit: with them the logits
            are read once more.
        inplace: whether to write the gradient over the logits (or the memory that they are a view
            of); autograd raises an error if another function has saved them. The logits must not be
            a leaf, a view of a leaf, or expanded. Without gradient, `inplace` has no effect.
        grad_scale: > 0, a float or 0-d tensor: an fp16 loss scaler's scale. The gradient is written
            multiplied by it, lest it underflow; the backward divides grad_output by it.
        check: whether to check the range of tokens, which waits for the device.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        PolicyLoss(loss, logprob_N, entropy_N, kl_N, metrics), float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes that disagree, a setting out of range, a missing reference or offsets.
        TypeError: inputs of the wrong kind.
        RuntimeError: a second backward through an in-place loss, or a backward after the logits
            were used or modified again.

    Source: Schulman et al. 2017, Proximal Policy Optimization Algorithms, eq. 7; see
        PolicyLossConfig.
    """
    op = "policy_loss"
    given_NV = logits_NV
    logits_NV, lead = rows_and_lead(op, "logits_NV", logits_NV)
    if vocab_size is not None:
        logits_NV = first_words(op, logits_NV, vocab_size)
    if inplace is not False:
        check_flag(op, "inplace", inplace)
    chosen = chosen_backend(op, backend, logits_NV)
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
    )
    loss = loss_arguments(
        op,
        logits_NV,
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
        lead=lead,
    )
    need_grad = torch.is_grad_enabled() and logits_NV.requires_grad
    given = Arguments(logits_NV, rows, loss, need_grad, chosen)
    if inplace and need_grad:
        check_inplace(op, given_NV, logits_NV)
        found = _PolicyLossInPlace.apply(logits_NV, given)  # type: ignore[no-untyped-call]
        return unpack(LossOutputs(*found[:5]), lead)
    if is_traced(logits_NV):
        return unpack(_registered(given).outputs(), lead)
    outputs, grad_NV = _forward(given)
    if need_grad:
        outputs = GradientMade.of(op, outputs, (grad_NV,), loss, chosen, (logits_NV,))
    return unpack(outputs, lead)


def unpack(outputs: LossOutputs, lead: torch.Size) -> PolicyLoss:
    """Convert to the public PolicyLoss, in the shape of the tokens."""
    loss, logprob_N, entropy_N, kl_N, vector = outputs
    if len(lead) != 1:
        logprob_N, entropy_N, kl_N = (in_shape(x, lead) for x in (logprob_N, entropy_N, kl_N))
    return PolicyLoss(loss, logprob_N, entropy_N, kl_N, PolicyMetrics(vector))


class Arguments(NamedTuple):
    """Arguments of the registered operator."""

    logits_NV: Tensor
    rows: RowArguments
    loss: LossArguments
    need_grad: bool
    backend: str


class Outputs(NamedTuple):
    """Outputs of the registered operator, whose gradient is `donated`; it is empty if unwanted."""

    loss: Tensor
    logprob_N: Tensor
    entropy_N: Tensor
    kl_N: Tensor
    metrics: Tensor
    grad_NV: Tensor

    def outputs(self) -> LossOutputs:
        loss, logprob_N, entropy_N, kl_N, metrics, _ = self
        return LossOutputs(loss, logprob_N, entropy_N, kl_N, metrics)


class DenseRows(NamedTuple):
    """Logits that are stored, as one chunk; gradients go to `out_NV`, which may be the logits."""

    logits_NV: Tensor
    out_NV: Tensor | None = None

    def visit(self, kernel: ChunkKernel, *, write: bool) -> None:
        everything, out_NV = slice(0, self.logits_NV.shape[0]), self.out_NV if write else None
        if out_NV is None or out_NV.shape[1] <= 1 or out_NV.stride(1) == 1:
            kernel(everything, self.logits_NV, out_NV)
            return
        # In place over logits with a stride other than 1, while kernels write with stride 1.
        apart_NV = torch.empty(out_NV.shape, dtype=out_NV.dtype, device=out_NV.device)
        kernel(everything, self.logits_NV, apart_NV)
        out_NV.copy_(apart_NV)


def sweep(
    chunks: Chunks,
    rows: RowArguments,
    loss: LossArguments,
    like: Tensor,
    need_grad: bool,
    backend: str,
    parts: TokenKernels | None = None,
) -> LossOutputs:
    """Compute the loss over all rows; the gradient, if needed, is written to where `chunks` says.

    With a loss by token one pass over the rows gives statistics and gradient. A loss by sequence
    needs all log-probs of the sequence first, so there is a second pass. `parts` are the kernels of
    rows that are parts of longer ones, which have no fused loss.
    """
    kernels = BACKENDS[backend]
    if parts is not None or not loss.fused:
        stats = empty_statistics(like, backend)
        go = sweep_by_sequence if loss.by_sequence else sweep_by_token
        found = go(parts or kernels, chunks, rows, loss, stats, need_grad)
        return LossOutputs(found[0], stats.logprob_N, stats.entropy_N, *found[1:])
    into = empty_loss_rows(like, backend)
    chunks.visit(
        lambda at, x_NV, out_NV: kernels.policy_loss(x_NV, out_NV, rows, loss, at, into),
        write=need_grad,
    )
    total, kl_N, metrics = kernels.loss_totals(rows, loss, into)
    return LossOutputs(total, into.logprob_N, into.entropy_N, kl_N, metrics)


def empty_loss_rows(like: Tensor, backend: str) -> LossRows:
    """Uninitialised LossRows for the rows of `like`; results of a registered op share no memory."""
    n, dtype = like.shape[0], stat_dtype(like)
    return LossRows(
        like.new_empty(n, dtype=dtype),
        like.new_empty(n, dtype=dtype),
        like.new_empty(n, dtype=dtype),
        like.new_empty((TERMS, 0 if backend == "torch" else n), dtype=dtype),
    )


def fake_outputs(like: Tensor) -> LossOutputs:
    """Tensors with the shapes of the results of `sweep`."""
    into = empty_loss_rows(like, "torch")
    loss, metrics = (into.logprob_N.new_empty(size) for size in ((), (TERMS - 1,)))
    return LossOutputs(loss, into.logprob_N, into.entropy_N, into.kl_N, metrics)


def _forward(a: Arguments) -> tuple[LossOutputs, Tensor | None]:
    """The outputs, and the gradient of the logits if it is needed."""
    logits_NV = constant(a.logits_NV)
    grad_NV = fresh_like(logits_NV, beside=a.backend == "triton") if a.need_grad else None
    chunks = DenseRows(logits_NV, grad_NV)
    return sweep(chunks, a.rows, a.loss, logits_NV, a.need_grad, a.backend), grad_NV


def _forward_donated(a: Arguments) -> Outputs:
    outputs, grad_NV = _forward(a)
    if grad_NV is None:
        return Outputs(*outputs, a.logits_NV.new_empty(0))
    return Outputs(*outputs, donated(grad_NV, a.backend))


def _fake(a: Arguments) -> Outputs:
    grad_NV = a.logits_NV.new_empty(a.logits_NV.shape if a.need_grad else 0)
    grad_NV = fake_donated(grad_NV, a.backend) if a.need_grad else grad_NV
    return Outputs(*fake_outputs(a.logits_NV), grad_NV)


def _save(ctx: Any, a: Arguments, outputs: Outputs) -> None:
    save_settings(ctx, a.loss, a.backend)
    ctx.save_for_backward(outputs.grad_NV)


def _gradients(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None or not ctx.needs_input_grad[0]:
        return (None,)
    return scaled_donated(ctx, ctx.saved_tensors, grad_loss)


class _PolicyLossInPlace(torch.autograd.Function):
    """The gradient overwrites the logits, which are marked dirty: functions that saved them fail.

    torch allows no autograd for a registered operator that writes to its input. And autograd does
    not let a function with several outputs mark a view dirty; but the write increases the version
    of the base, so there is an error all the same, except for a later use of the logits themselves.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, a: Arguments) -> tuple[Tensor, ...]:
        target_NV = logits_NV.detach()
        chunks = DenseRows(target_NV, target_NV)
        outputs = sweep(chunks, a.rows, a.loss, target_NV, True, a.backend)
        # torch does not see a kernel's write: increase the version that saved tensors compare.
        torch.autograd.graph.increment_version(logits_NV)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        save_settings(ctx, a.loss, a.backend)
        if logits_NV._is_view():
            ctx.save_for_backward(logits_NV)
            return outputs
        ctx.mark_dirty(logits_NV)
        ctx.save_for_backward(logits_NV)
        return (*outputs, logits_NV)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
        if rest[-1] is not None:
            raise RuntimeError(
                "policy_loss: the logits were used after inplace=True wrote their gradient over "
                "them; use them before, or leave inplace out"
            )
        if getattr(ctx, "taken", False):
            raise RuntimeError(
                "policy_loss: a second backward through inplace=True, whose gradient the first "
                "one took; leave inplace out to keep the graph"
            )
        (logits_NV,) = ctx.saved_tensors  # an error if it was modified since
        if grad_loss is None:
            return (None,) * 2
        (grad_NV,) = scaled("policy_loss", ctx, (logits_NV.detach(),), grad_loss)
        ctx.taken = True
        return grad_NV, None, None


_registered = register(
    "policy_loss",
    Arguments,
    Outputs,
    _forward_donated,
    _fake,
    results=1,
    save=_save,
    backward=_gradients,
)
