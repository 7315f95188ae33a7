"""PPO's clipped loss straight from hidden states: two GEMMs for a frozen head, and no logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops import checks
from fastppo.ops.backend import choose
from fastppo.ops.config import HeadLora, PolicyLossConfig
from fastppo.ops.head import Head, LinearRows, check_head, logits_dtype_of
from fastppo.ops.linear_token_logprobs import cast_like, dense_logits, make_hidden
from fastppo.ops.policy_loss import (
    PolicyLoss,
    make_policy_inputs,
    policy_loss_reference,
    prepare,
    sweep,
    times,
    unpack,
)
from fastppo.ops.registry import Op, Shape, register
from fastppo.ops.rows import RowSpec
from fastppo.ops.surrogate import PolicyInputs


def linear_policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    token_N: Tensor,
    behaviour_logprob_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    head_lora: HeadLora | None = None,
    ref_logprob_N: Tensor | None = None,
    importance_weight_N: Tensor | None = None,
    offsets: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    kl_coef: float | Tensor | None = None,
    entropy_coef: float | Tensor | None = None,
    config: PolicyLossConfig | None = None,
    grad_scale: float | Tensor | None = None,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    ignore_index: int = checks.IGNORE_INDEX,
    check: bool = False,
    backend: str | None = None,
) -> PolicyLoss:
    r"""`policy_loss` of logits h W^T + bias that are never held, in units of the advantage.

    The gradient is made in the forward, chunk by chunk: two GEMMs for a frozen head, three for a
    trained one, one under no_grad. A ratio by sequence needs all log-probs first and costs one
    more. Operands are multiplied in the dtype they have; autocast is not consulted.

    Args:
        hidden_ND: float (N, D); differentiable.
        weight_VD: float (V, D), of the same dtype; its gradient is made only if it asks for one.
        token_N: int64 (N,), sampled tokens in [0, V), or `ignore_index`.
        behaviour_logprob_N: float (N,), their log-probs under the policy that sampled.
        advantage_N: float (N,).
        weight_N: float (N,); mask and aggregation in one.
        bias_V: float (V,).
        head_lora: an adapter on the head, see HeadLora.
        chunk_bytes: how many bytes of logits may exist at a time; None suits the device.
        logits_dtype: what the GEMM gives; None is the operands' dtype, float32 keeps what bf16
            rounds.
        ref_logprob_N, importance_weight_N, offsets, temperature, softcap, kl_coef, entropy_coef,
            config, grad_scale, check, backend: as in `policy_loss`.

    Returns:
        PolicyLoss(loss, logprob_N, entropy_N, kl_N, metrics), float32 (float64 for float64 input).

    Raises:
        ValueError: shapes that disagree, a setting out of range, a missing reference or offsets.
        TypeError: inputs of the wrong kind, hidden states and weight of two dtypes.

    Source: as `policy_loss`.
    """
    op = "linear_policy_loss"
    choose(op, backend)
    head = Head(weight_VD, bias_V, head_lora)
    check_head(op, hidden_ND, head)
    n, vocab = hidden_ND.shape[0], weight_VD.shape[0]
    checks.tokens(op, token_N, hidden_ND, n=n, vocab=vocab, ignore_index=ignore_index, check=check)
    dtype = checks.stat_dtype(hidden_ND)
    spec, inputs = prepare(
        op,
        hidden_ND,
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
    enabled = torch.is_grad_enabled()
    tensors = (hidden_ND, *head.tensors())
    wanted = tuple(enabled and tensor is not None and tensor.requires_grad for tensor in tensors)
    scale = 1.0 if grad_scale is None else grad_scale
    settings = (dtype, logits_dtype_of(op, hidden_ND, logits_dtype), chunk_bytes)
    outputs = _LinearPolicyLoss.apply(  # type: ignore[no-untyped-call]
        *tensors, head, spec, inputs, settings, wanted, scale
    )
    return unpack(outputs)


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        a_RD: Tensor | None,
        b_VR: Tensor | None,
        head: Head,
        spec: RowSpec,
        inputs: PolicyInputs,
        settings: tuple[torch.dtype, torch.dtype, int | None],
        wanted: tuple[bool, bool, bool, bool, bool],
        scale: float | Tensor,
    ) -> tuple[Tensor, ...]:
        rows = LinearRows(hidden_ND, head.detach(), *settings, spec.live_N, wanted)
        outputs = sweep(
            rows, spec, inputs, hidden_ND, settings[0], need_grad=any(wanted), scale=scale
        )
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*cast_like(rows.grads, (hidden_ND, weight_VD, bias_V, a_RD, b_VR)))
        ctx.scale = scale
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        factor = grad_output / ctx.scale
        grads = (None if g is None else times(g, factor, own=False) for g in ctx.saved_tensors)
        return (*grads, *([None] * 6))


def linear_policy_loss_reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    token_N: Tensor,
    behaviour_logprob_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    head_lora: HeadLora | None = None,
    **keywords: Any,
) -> PolicyLoss:
    """The definition of `linear_policy_loss`, for autograd."""
    logits_NV = dense_logits(hidden_ND, weight_VD, bias_V, head_lora)
    return policy_loss_reference(
        logits_NV, token_N, behaviour_logprob_N, advantage_N, weight_N, **keywords
    )


def _make_inputs(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    return {**make_hidden(shape, dtype, seed), **make_policy_inputs(shape, dtype, seed)}


register(
    Op(
        name="linear_policy_loss",
        function=linear_policy_loss,
        reference=linear_policy_loss_reference,
        make_inputs=_make_inputs,
        bytes_moved=lambda s, dtype: 2 * (s.n + s.vocab) * s.hidden * dtype.itemsize,
        flops=lambda s: 4 * s.n * s.vocab * s.hidden,
        differentiable=("hidden_ND",),
        loss="loss",
    )
)
