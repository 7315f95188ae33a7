"""PPO's clipped loss from logits, its gradient written in the forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops import checks
from fastppo.ops.arguments import LossArguments, row_arguments, split
from fastppo.ops.backend import choose, row_kernels
from fastppo.ops.config import PolicyLossConfig
from fastppo.ops.rows import DenseRows
from fastppo.ops.surrogate import PolicyMetrics
from fastppo.ops.sweep import sweep
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
    behaviour_logprob_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    *,
    ref_logprob_N: Tensor | None = None,
    importance_weight_N: Tensor | None = None,
    offsets: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    kl_coef: float | Tensor | None = None,
    entropy_coef: float | Tensor | None = None,
    config: PolicyLossConfig | None = None,
    inplace: bool = False,
    grad_scale: float | Tensor | None = None,
    ignore_index: int = checks.IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> PolicyLoss:
    r"""PPO's loss over packed tokens, KL and entropy included, in units of the advantage.

        rho = exp(clamp(logprob - behaviour, +-limit))
        L   = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))
        L   = min(L, -dual_clip A)  where A < 0
        loss = sum_i w_i (u_i L_i + kl_coef k_i - entropy_coef H_i)

    The weights carry mask and aggregation, fixed over the whole optimiser step (token-mean: 1 / its
    live tokens), so splitting a batch into micro-batches changes nothing but rounding.

    Args:
        logits_NV: float (N, V), any strides; -inf is masked vocabulary. The only differentiable
            input.
        token_N: int64 (N,), sampled tokens in [0, V), or `ignore_index`: as weight 0.
        behaviour_logprob_N: float (N,), their log-probs under the policy that sampled.
        advantage_N: float (N,).
        weight_N: float (N,); rows of weight 0 are neither read nor counted, their gradient is 0.
        ref_logprob_N: float (N,), needed where kl_coef is not 0.
        importance_weight_N: float (N,), scales the surrogate alone (truncated importance sampling).
        offsets: int32 (B+1,), where each sequence starts; needed by ratio_level="sequence".
        temperature: > 0, a float or a float tensor () or (N,): that of the sampling.
        softcap: > 0, or None for none.
        kl_coef, entropy_coef: a float or 0-d tensor in place of the configuration's.
        config: clipping and regularisers; None is PPO's own, PolicyLossConfig().
        inplace: write the gradient over the logits, or over the memory that they are a view of:
            whoever saved them gets autograd's error. They must be no leaf, nor a view of one, nor
            expanded; without a gradient to write it does nothing.
        grad_scale: > 0, a float or 0-d tensor; what is written is multiplied by it and grad_output
            divided: the scale of an fp16 loss scaler, before which the gradient would underflow.
        check: also refuse tokens out of range; waits for the device.
        backend: "triton", "native" or "torch"; None chooses by device.

    Returns:
        PolicyLoss(loss, logprob_N, entropy_N, kl_N, metrics), float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes that disagree, a setting out of range, a missing reference or offsets.
        TypeError: inputs of the wrong kind.
        RuntimeError: a second backward through an in-place loss, or one after the logits were used
            or written to again.

    Source: Schulman et al. 2017, Proximal Policy Optimization Algorithms, eq. 7; see
        PolicyLossConfig.
    """
    op = "policy_loss"
    checks.floating(op, "logits_NV", logits_NV, ndim=2)
    chosen = choose(op, backend, logits_NV)
    n, vocab = logits_NV.shape
    checks.tokens(op, token_N, logits_NV, n=n, vocab=vocab, ignore_index=ignore_index, check=check)
    arguments = loss_arguments(
        op,
        logits_NV,
        token_N,
        behaviour_logprob_N,
        advantage_N,
        weight_N,
        ref_logprob_N=ref_logprob_N,
        importance_weight_N=importance_weight_N,
        offsets=offsets,
        temperature=temperature,
        softcap=softcap,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        config=PolicyLossConfig() if config is None else config,
        grad_scale=grad_scale,
        ignore_index=ignore_index,
    )
    need_grad = torch.is_grad_enabled() and logits_NV.requires_grad
    if inplace and need_grad:
        checks.inplace(op, logits_NV)
        in_place = _PolicyLossInPlace.apply(logits_NV, arguments, chosen)  # type: ignore[no-untyped-call]
        return unpack(in_place)
    flat = (*arguments.flat(), need_grad, chosen)
    return unpack(torch.ops.fastppo.policy_loss(logits_NV, *flat))


def loss_arguments(
    op: str,
    like: Tensor,
    token_N: Tensor,
    behaviour_logprob_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    *,
    ref_logprob_N: Tensor | None,
    importance_weight_N: Tensor | None,
    offsets: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    kl_coef: float | Tensor | None,
    entropy_coef: float | Tensor | None,
    config: PolicyLossConfig,
    grad_scale: float | Tensor | None,
    ignore_index: int,
) -> LossArguments:
    """Check what the host can see, and put it into the form of the registered operators."""
    n = token_N.numel()
    optional = {"ref_logprob_N": ref_logprob_N, "importance_weight_N": importance_weight_N}
    needed = {
        "behaviour_logprob_N": behaviour_logprob_N,
        "advantage_N": advantage_N,
        "weight_N": weight_N,
    }
    for name, tensor in {**needed, **optional}.items():
        checks.row_vector(op, name, tensor, like, n=n)
    checks.temperature(op, temperature, like, n=n)
    checks.softcap(op, softcap)
    beta = config.kl_coef if kl_coef is None else kl_coef
    bonus = config.entropy_coef if entropy_coef is None else entropy_coef
    for name, value in {"kl_coef": beta, "entropy_coef": bonus, "grad_scale": grad_scale}.items():
        checks.scalar(op, name, value, like)
    if ref_logprob_N is None and (isinstance(beta, Tensor) or beta != 0):
        raise ValueError(f"{op}: ref_logprob_N is needed where kl_coef is not 0, came None")
    if config.ratio_level == "sequence":
        if offsets is None:
            raise ValueError(f"{op}: offsets are needed by ratio_level='sequence', came None")
        checks.offsets(op, offsets, like, n=n)
    return LossArguments(
        row_arguments(token_N, temperature, softcap, ignore_index),
        behaviour_logprob_N.detach(),
        advantage_N.detach(),
        weight_N.detach(),
        None if ref_logprob_N is None else ref_logprob_N.detach(),
        None if importance_weight_N is None else importance_weight_N.detach(),
        offsets if config.ratio_level == "sequence" else None,
        *split(beta),
        *split(bonus),
        *split(1.0 if grad_scale is None else grad_scale),
        config.clip_low,
        config.clip_high,
        config.dual_clip,
        config.kl_kind,
        config.ratio_level,
        config.log_ratio_limit,
    )


def unpack(outputs: tuple[Tensor, ...]) -> PolicyLoss:
    """The functional tuple as the public one; metrics are slices of one vector."""
    loss, *rest = outputs[:5]
    logprob_N, entropy_N, kl_N, vector = (x.detach() for x in rest)
    return PolicyLoss(loss, logprob_N, entropy_N, kl_N, PolicyMetrics(*vector.unbind(0)))


def scaled(op: str, ctx: Any, grads: list[Tensor | None], grad_loss: Tensor) -> list[Tensor | None]:
    """Gradients written in the forward times grad_loss / grad_scale, most often 1.

    Kernels' gradients are scaled in place, and where there is nothing to do no pass is made: on a
    GPU the device decides, and the host does not wait. So a second backward is an error there.
    """
    factor = grad_loss / ctx.scale
    # While a compiler traces, tensors are stand-ins without values, or it says so itself.
    if torch.compiler.is_compiling() or type(grad_loss) is not Tensor:
        return [None if grad is None else (grad * factor).to(grad.dtype) for grad in grads]
    if ctx.backend == "torch":
        if factor.device.type == "cpu" and factor.item() == 1.0:
            return grads
        return [None if grad is None else grad * factor for grad in grads]
    if ctx.taken:
        raise RuntimeError(
            f"{op}: a second backward, whose gradient the first one took; call {op} again"
        )
    ctx.taken = True
    for grad in grads:
        if grad is not None:
            row_kernels(ctx.backend).scale_unless_one(grad.detach(), grad_loss, ctx.scale)
    return grads


def saved_settings(ctx: Any, arguments: LossArguments, backend: str) -> None:
    """What `scaled` needs of the forward."""
    ctx.scale, ctx.backend, ctx.taken = arguments.scale, backend, False
    ctx.set_materialize_grads(False)


@torch.library.custom_op(
    "fastppo::policy_loss",
    mutates_args=(),
    schema=f"(Tensor logits_NV, {LossArguments.SCHEMA}, bool need_grad, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(logits_NV: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    """Loss, log-prob, entropy, KL, metrics, and the gradient of the logits (empty if unwanted)."""
    *values, need_grad, backend = flat
    grad_NV = fresh_like(logits_NV) if need_grad else logits_NV.new_empty(0)
    rows = DenseRows(logits_NV, grad_NV)
    outputs = sweep(rows, LossArguments.of(tuple(values)), logits_NV, need_grad, backend)
    return (*outputs, grad_NV)


def fake_outputs(like: Tensor, n: Any) -> tuple[Tensor, ...]:
    """The shapes of `Outputs`."""
    dtype = checks.stat_dtype(like)
    sizes: tuple[tuple[Any, ...], ...] = ((), (n,), (n,), (n,), (len(PolicyMetrics._fields),))
    return tuple(like.new_empty(size, dtype=dtype) for size in sizes)


@_forward.register_fake
def _(logits_NV: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    grad_NV = logits_NV.new_empty(logits_NV.shape if flat[-2] else 0)
    return (*fake_outputs(logits_NV, logits_NV.shape[0]), grad_NV)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[5])
    saved_settings(ctx, LossArguments.of(inputs[1:-2]), inputs[-1])


@once_differentiable
def _autograd(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * (LossArguments.COUNT + 2)
    if grad_loss is None or not ctx.needs_input_grad[0]:
        return (None, *nothing)
    (grad_NV,) = scaled("policy_loss", ctx, list(ctx.saved_tensors), grad_loss)
    return (grad_NV, *nothing)


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _PolicyLossInPlace(torch.autograd.Function):
    """The gradient overwrites the logits, marked dirty: whoever saved them gets an error.

    torch gives no autograd to a registered operator that writes over its input, so this is none.
    Autograd lets no function with several outputs mark a view dirty. A view's version is its base's
    and the write has raised it, so the error comes all the same; only a later use of the logits
    themselves goes unseen.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, arguments: LossArguments, backend: str
    ) -> tuple[Tensor, ...]:
        target_NV = logits_NV.detach()
        outputs = sweep(DenseRows(target_NV, target_NV), arguments, target_NV, True, backend)
        # A kernel's write is not torch's: raise the version that others' saved tensors compare.
        torch.autograd.graph.increment_version(logits_NV)
        ctx.mark_non_differentiable(*outputs[1:])
        saved_settings(ctx, arguments, backend)
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
        if ctx.taken:
            raise RuntimeError(
                "policy_loss: a second backward through inplace=True, whose gradient the first "
                "one took; leave inplace out to keep the graph"
            )
        (logits_NV,) = ctx.saved_tensors  # refuses where something has written to it since
        if grad_loss is None:
            return (None,) * 3
        (grad_NV,) = scaled("policy_loss", ctx, [logits_NV.detach()], grad_loss)
        ctx.taken = True
        return grad_NV, None, None
