"""PPO's clipped loss straight from hidden states: two GEMMs for a frozen head, and no logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops import checks
from fastppo.ops.arguments import LossArguments
from fastppo.ops.backend import choose
from fastppo.ops.config import HeadLora, PolicyLossConfig
from fastppo.ops.head import (
    CHUNK_SCHEMA,
    HEAD_SCHEMA,
    Head,
    LinearRows,
    asked,
    check_head,
    fake_results,
    logits_dtype_of,
)
from fastppo.ops.policy_loss import (
    PolicyLoss,
    fake_outputs,
    loss_arguments,
    saved_settings,
    scaled,
    unpack,
)
from fastppo.ops.sweep import sweep


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
    head = Head(weight_VD, bias_V, head_lora)
    check_head(op, hidden_ND, head)
    chosen = choose(op, backend, hidden_ND)
    n, vocab = hidden_ND.shape[0], weight_VD.shape[0]
    checks.tokens(op, token_N, hidden_ND, n=n, vocab=vocab, ignore_index=ignore_index, check=check)
    arguments = loss_arguments(
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
        grad_scale=grad_scale,
        ignore_index=ignore_index,
    )
    enabled = torch.is_grad_enabled()
    tensors = (hidden_ND, *head.tensors())
    wanted = [enabled and tensor is not None and tensor.requires_grad for tensor in tensors]
    dtype = logits_dtype_of(op, hidden_ND, logits_dtype)
    return unpack(
        torch.ops.fastppo.linear_policy_loss(
            hidden_ND, *head.flat(), *arguments.flat(), dtype, chunk_bytes, wanted, chosen
        )
    )


@torch.library.custom_op(
    "fastppo::linear_policy_loss",
    mutates_args=(),
    schema=f"(Tensor hidden_ND, {HEAD_SCHEMA}, {LossArguments.SCHEMA}, {CHUNK_SCHEMA}, "
    f"bool[] wanted, str backend) -> ({', '.join(['Tensor'] * 10)})",
)
def _forward(hidden_ND: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    """Loss, log-prob, entropy, KL, metrics; then the gradients of hidden states and head."""
    head, arguments = Head.of(flat[:5]), LossArguments.of(flat[5:-4])
    logits_dtype, chunk_bytes, wanted, backend = flat[-4:]
    stat, live_N = checks.stat_dtype(hidden_ND), arguments.live_N()
    rows = LinearRows(hidden_ND, head, stat, logits_dtype, chunk_bytes, live_N, wanted)
    return (*sweep(rows, arguments, hidden_ND, any(wanted), backend), *rows.results())


@_forward.register_fake
def _(hidden_ND: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    outputs = fake_outputs(hidden_ND, hidden_ND.shape[0])
    return (*outputs, *fake_results(hidden_ND, Head.of(flat[:5]), flat[-2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[5:])
    ctx.wanted = inputs[-2]
    saved_settings(ctx, LossArguments.of(inputs[6:-4]), inputs[-1])


@once_differentiable
def _autograd(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * (1 + LossArguments.COUNT + 4)
    if grad_loss is None:
        return (*[None] * 5, *nothing)
    grads = asked(ctx.wanted, ctx.saved_tensors)
    return (*scaled("linear_policy_loss", ctx, grads, grad_loss), *nothing)


_forward.register_autograd(_autograd, setup_context=_setup_context)
