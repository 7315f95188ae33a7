"""PPO's clipped loss from logits, its gradient written in the forward."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops import checks
from fastppo.ops.backend import choose
from fastppo.ops.config import PolicyLossConfig
from fastppo.ops.registry import Op, Shape, register
from fastppo.ops.rows import (
    DenseRows,
    RowSpec,
    Visitor,
    gradient,
    row_outputs,
    row_spec,
    statistics,
)
from fastppo.ops.surrogate import PolicyInputs, PolicyMetrics, token_gradient, totals
from fastppo.ops.token_kl import token_kl_reference
from fastppo.ops.token_logprobs import log_probs_reference, make_logits


class PolicyLoss(NamedTuple):
    """`loss` is a differentiable scalar, the rest is detached; `kl_N` is 0 without a reference."""

    loss: Tensor
    logprob_N: Tensor
    entropy_N: Tensor
    kl_N: Tensor
    metrics: PolicyMetrics


class Rows(Protocol):
    """Logits that exist, or that are made chunk by chunk from hidden states."""

    def visit(self, visitor: Visitor) -> None:
        """Show every row to `visitor` once; keep the gradient that it gives back, if it does."""


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
        backend: "torch", or None to choose by device.

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
    choose(op, backend)
    checks.floating(op, "logits_NV", logits_NV, ndim=2)
    n, vocab = logits_NV.shape
    checks.tokens(op, token_N, logits_NV, n=n, vocab=vocab, ignore_index=ignore_index, check=check)
    dtype = checks.stat_dtype(logits_NV)
    spec, inputs = prepare(
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
        ignore_index=ignore_index,
        dtype=dtype,
    )
    need_grad = torch.is_grad_enabled() and logits_NV.requires_grad
    if inplace and need_grad:
        checks.inplace(op, logits_NV)
    scale = 1.0 if grad_scale is None else grad_scale
    function = _PolicyLossInPlace if inplace and need_grad else _PolicyLoss
    outputs = function.apply(  # type: ignore[no-untyped-call]
        logits_NV, spec, inputs, dtype, need_grad, scale
    )
    return unpack(outputs)


def prepare(
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
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[RowSpec, PolicyInputs]:
    """Check what the host can see, and give rows that are not live finite filler."""
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
    if ref_logprob_N is None and (isinstance(beta, Tensor) or beta != 0):
        raise ValueError(f"{op}: ref_logprob_N is needed where kl_coef is not 0, came None")
    if config.ratio_level == "sequence":
        if offsets is None:
            raise ValueError(f"{op}: offsets are needed by ratio_level='sequence', came None")
        checks.offsets(op, offsets, like, n=n)
    live_N = (weight_N != 0) & (token_N != ignore_index)

    def filled(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.where(live_N, tensor.detach(), 0).to(dtype)

    def coefficient(value: float | Tensor) -> float | Tensor:
        return value.detach().to(dtype) if isinstance(value, Tensor) else value

    behaviour, advantage, weight = (filled(tensor) for tensor in needed.values())
    assert behaviour is not None
    assert advantage is not None
    assert weight is not None
    inputs = PolicyInputs(
        behaviour_logprob_N=behaviour,
        advantage_N=advantage,
        weight_N=weight,
        live_N=live_N,
        ref_logprob_N=filled(ref_logprob_N),
        importance_weight_N=filled(importance_weight_N),
        kl_coef=coefficient(beta),
        entropy_coef=coefficient(bonus),
        config=config,
        offsets=offsets,
    )
    return row_spec(token_N, live_N, temperature, softcap, dtype), inputs


def sweep(
    rows: Rows,
    spec: RowSpec,
    inputs: PolicyInputs,
    like: Tensor,
    dtype: torch.dtype,
    *,
    need_grad: bool,
    scale: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Visit all rows; the gradient, if wanted, goes where `rows` keeps it.

    A token's loss is its own, so one visit gives statistics and gradient. A ratio by sequence needs
    all of its tokens' log-probs first: a visit for those, then one for the gradient.
    """
    n = spec.token_N.numel()
    logprob_N, entropy_N = row_outputs(like, n, dtype)
    by_token = need_grad and not inputs.by_sequence

    def first(at: slice, x: Tensor) -> Tensor | None:
        here = spec.at(at)
        stats = statistics(x, here)
        logprob_N[at], entropy_N[at] = stats.logprob, stats.entropy
        if not by_token:
            return None
        g, h = token_gradient(inputs.at(at), stats.logprob)
        return gradient(stats, here, scale * g, None if h is None else scale * h)

    rows.visit(first)
    if need_grad and inputs.by_sequence:
        g_N, h_N = token_gradient(inputs, logprob_N)

        def second(at: slice, x: Tensor) -> Tensor:
            here = spec.at(at)
            h = None if h_N is None else scale * h_N[at]
            return gradient(statistics(x, here), here, scale * g_N[at], h)

        rows.visit(second)
    loss, kl_N, metrics = totals(inputs, logprob_N, entropy_N)
    return (
        loss,
        logprob_N,
        entropy_N,
        torch.zeros_like(logprob_N) if kl_N is None else kl_N,
        metrics,
    )


def unpack(outputs: tuple[Tensor, ...]) -> PolicyLoss:
    """The functional tuple as the public one; metrics are slices of one vector."""
    loss, logprob_N, entropy_N, kl_N, vector = outputs[:5]
    return PolicyLoss(loss, logprob_N, entropy_N, kl_N, PolicyMetrics(*vector.unbind(0)))


def times(grad: Tensor, factor: Tensor, *, own: bool) -> Tensor:
    """grad * factor; `own` allows to write over grad. On the CPU a factor of 1 costs nothing."""
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return grad
    return grad.mul_(factor) if own else grad * factor


class _PolicyLoss(torch.autograd.Function):
    """The gradient lies in a buffer of its own until the backward scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        spec: RowSpec,
        inputs: PolicyInputs,
        dtype: torch.dtype,
        need_grad: bool,
        scale: float,
    ) -> tuple[Tensor, ...]:
        grad_NV = (
            torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
            if need_grad
            else None
        )
        rows = DenseRows(logits_NV, dtype, grad_NV)
        outputs = sweep(rows, spec, inputs, logits_NV, dtype, need_grad=need_grad, scale=scale)
        ctx.mark_non_differentiable(*outputs[1:])
        if grad_NV is not None:
            ctx.save_for_backward(grad_NV)
        ctx.scale = scale
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (grad_NV,) = ctx.saved_tensors
        return times(grad_NV, grad_output / ctx.scale, own=False), None, None, None, None, None


class _PolicyLossInPlace(torch.autograd.Function):
    """The gradient overwrites the logits, marked dirty: whoever saved them gets an error.

    Autograd lets no function with several outputs mark a view dirty. A view's version is its base's
    and the write has raised it, so the error comes all the same; only a later use of the logits
    themselves goes unseen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        spec: RowSpec,
        inputs: PolicyInputs,
        dtype: torch.dtype,
        need_grad: bool,
        scale: float,
    ) -> tuple[Tensor, ...]:
        rows = DenseRows(logits_NV, dtype, logits_NV)
        outputs = sweep(rows, spec, inputs, logits_NV, dtype, need_grad=need_grad, scale=scale)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(logits_NV)
        ctx.scale, ctx.taken = scale, False
        ctx.set_materialize_grads(False)
        if logits_NV._is_view():
            return outputs
        ctx.mark_dirty(logits_NV)
        return (*outputs, logits_NV)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
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
        ctx.taken = True
        (logits_NV,) = ctx.saved_tensors  # refuses where something has written to it since
        if grad_output is None:
            return (None,) * 6
        grad_NV = times(logits_NV.detach(), grad_output / ctx.scale, own=True)
        return grad_NV, None, None, None, None, None


def policy_loss_reference(
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
    ignore_index: int = checks.IGNORE_INDEX,
) -> PolicyLoss:
    """The definition of `policy_loss`, for autograd: every derivative is torch's own."""
    config = PolicyLossConfig() if config is None else config
    beta = config.kl_coef if kl_coef is None else kl_coef
    bonus = config.entropy_coef if entropy_coef is None else entropy_coef
    live = (weight_N != 0) & (token_N != ignore_index)
    index = live.nonzero().squeeze(1)
    tau = temperature
    if isinstance(tau, Tensor) and tau.ndim == 1:
        tau = tau[index]
    all_live = torch.ones_like(index, dtype=torch.bool)
    log_p = log_probs_reference(logits_NV[index], all_live, tau, softcap)
    logprob = log_p.gather(1, token_N[index].long()[:, None]).squeeze(1)
    possible = log_p > float("-inf")
    entropy = -torch.where(possible, log_p.exp() * torch.where(possible, log_p, 0), 0).sum(-1)

    masked = logprob == float("-inf")
    limit = config.log_ratio_limit
    raw = torch.where(masked, -limit, torch.where(masked, 0, logprob) - behaviour_logprob_N[index])
    used = raw
    if config.ratio_level == "sequence":
        assert offsets is not None
        bounds = offsets.tolist()
        used = raw.clone()
        for start, end in pairwise(bounds):
            mine = (index >= start) & (index < end)
            if mine.any():
                dead = bool(masked[mine].any())
                mean = raw[mine].detach() if dead else raw[mine]
                used = torch.where(mine, float("-inf") if dead else mean.mean(), used)
        masked = used == float("-inf")
    # torch's clamp passes the gradient at the limit itself, as `slope` does.
    ratio = torch.where(masked, 0, torch.where(masked, 0, used).clamp(-limit, limit).exp())
    advantage = advantage_N[index]
    surrogate = torch.maximum(
        -advantage * ratio, -advantage * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    )
    if config.dual_clip is not None:
        bound = torch.minimum(surrogate, -config.dual_clip * advantage)
        surrogate = torch.where(advantage < 0, bound, surrogate)
    if importance_weight_N is not None:
        surrogate = surrogate * importance_weight_N[index]
    weight = weight_N[index]
    loss = (weight * surrogate).sum()
    kl = torch.zeros_like(logprob)
    if ref_logprob_N is not None:
        kl = token_kl_reference(
            logprob, ref_logprob_N[index], kind=config.kl_kind, log_ratio_limit=limit
        )
        loss = loss + (weight * beta * kl).sum()
    sampled = logprob > float("-inf")
    loss = loss - (weight * bonus * torch.where(sampled, entropy, 0)).sum()

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(token_N.numel()).index_copy(0, index, x.detach())

    filler = torch.zeros(len(PolicyMetrics._fields), dtype=loss.dtype)
    return PolicyLoss(
        loss, spread(logprob), spread(entropy), spread(kl), PolicyMetrics(*filler.unbind(0))
    )


def make_policy_inputs(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Everything but the logits: a policy that has moved, so that every branch occurs."""
    generator = torch.Generator().manual_seed(seed + 1)
    n = shape.n
    behaviour_N, moved_N, advantage_N = torch.randn(3, n, generator=generator, dtype=torch.float64)
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "behaviour_logprob_N": (-3 - behaviour_N.abs()).to(stat),
        "advantage_N": advantage_N.to(stat),
        "weight_N": torch.full((n,), 1.0 / max(n, 1), dtype=stat),
        "ref_logprob_N": (-3 - behaviour_N.abs() + 0.2 * moved_N).to(stat),
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
    }


def _make_inputs(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    logits_NV, token_N = make_logits(shape, dtype, seed)
    others = make_policy_inputs(shape, dtype, seed)
    logprob_N = log_probs_reference(
        logits_NV.double(), torch.ones(shape.n, dtype=torch.bool), 1.0, None
    ).gather(1, token_N[:, None])
    step_N = 0.3 * torch.randn(shape.n, generator=torch.Generator().manual_seed(seed + 2))
    behaviour_N = (logprob_N.squeeze(1) + step_N).to(others["behaviour_logprob_N"].dtype)
    others |= {"behaviour_logprob_N": behaviour_N, "ref_logprob_N": behaviour_N - 0.1}
    return {"logits_NV": logits_NV, "token_N": token_N, **others}


register(
    Op(
        name="policy_loss",
        function=policy_loss,
        reference=policy_loss_reference,
        make_inputs=_make_inputs,
        # one read and one write; the second read of a row is meant to hit the caches
        bytes_moved=lambda s, dtype: 2 * s.n * s.vocab * dtype.itemsize,
        flops=lambda s: 10 * s.n * s.vocab,
        differentiable=("logits_NV",),
        loss="loss",
    )
)
