"""PPO's clipped loss directly from hidden states: two GEMMs for a frozen head, and no logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
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
from fastppo.ops.config import HeadLora, PolicyLossConfig
from fastppo.ops.gradient_made import GradientMade, LossOutputs, save_settings, scaled
from fastppo.ops.head import (
    Head,
    HeadArguments,
    LinearRows,
    asked,
    fake_results,
)
from fastppo.ops.operands import check_chunk_bytes, logits_dtype_of, operands
from fastppo.ops.policy_loss import PolicyLoss, fake_outputs, sweep, unpack
from fastppo.ops.registered import register


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
    mask: Tensor | None = None,
    ref_logprob_N: Tensor | None = None,
    importance_weight_N: Tensor | None = None,
    offsets: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
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
    r"""`policy_loss` of the logits h W^T + bias, in units of the advantage, without storing them.

    The gradient is computed in the forward, chunk by chunk: two GEMMs for a frozen head, three for
    a trained one, one under no_grad. A ratio per sequence needs all log-probs first, which costs
    one more GEMM. Under torch.autocast operands are cast as `nn.Linear` casts them.

    Args:
        hidden_ND: float (..., D); differentiable. N stands for the tokens' shape, whatever it is.
        weight_VD: float (V, D), of the same dtype unless autocast makes it so; its gradient is
            computed only if it needs one.
        token_N: int64 (...), sampled tokens in [0, V), or `ignore_index`.
        behaviour_logprob_N: float (...), their log-probs under the policy that sampled.
        advantage_N: float (...).
        weight_N: float (...); mask and aggregation in one.
        bias_V: float (V,).
        head_lora: an adapter on the head, see HeadLora.
        chunk_bytes, logits_dtype, vocab_size: as in `linear_token_logprobs`.
        mask, ref_logprob_N, importance_weight_N, offsets, temperature, softcap, logit_scale,
            kl_coef, entropy_coef, config, grad_scale, check, backend: as in `policy_loss`.

    Returns:
        PolicyLoss(loss, logprob_N, entropy_N, kl_N, metrics), float32 (float64 for float64 input).

    Raises:
        ValueError: shapes that disagree, a setting out of range, a missing reference or offsets.
        TypeError: inputs of the wrong kind, hidden states and weight of different dtypes.

    Source: as `policy_loss`.
    """
    op = "linear_policy_loss"
    hidden_ND, head, lead = operands(
        op, hidden_ND, Head(weight_VD, bias_V, head_lora), vocab_size=vocab_size
    )
    chosen = chosen_backend(op, backend, hidden_ND)
    check_chunk_bytes(op, chunk_bytes)
    rows = row_arguments(
        op,
        token_N,
        hidden_ND,
        head.weight_VD.shape[0],
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
        hidden_ND,
        behaviour_logprob_N=behaviour_logprob_N,
        advantage_N=advantage_N,
        weight_N=weight_N,
        ref_logprob_N=ref_logprob_N,
        importance_weight_N=importance_weight_N,
        offsets=offsets,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        config=config,
        grad_scale=grad_scale,
        lead=lead,
    )
    enabled = torch.is_grad_enabled()
    tensors = (hidden_ND, *head.tensors())
    wanted = tuple(enabled and tensor is not None and tensor.requires_grad for tensor in tensors)
    dtype = logits_dtype_of(op, hidden_ND, logits_dtype)
    given = Arguments(hidden_ND, head.arguments(), rows, loss, dtype, chunk_bytes, wanted, chosen)
    if is_traced(hidden_ND):
        return unpack(_registered(given).outputs(), lead)
    found = _forward(given)
    outputs = found.outputs()
    if any(wanted):
        grads = asked(wanted, found.gradients())
        outputs = GradientMade.of(op, outputs, grads, loss, chosen, tensors)
    return unpack(outputs, lead)


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
    """Outputs of the registered operator; gradients that are not wanted are empty."""

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


def _forward(a: Arguments) -> Outputs:
    head, live_N = Head.of(a.head).detach(), live_rows(a.rows, a.loss.weight_N)
    hidden_ND, stat = a.hidden_ND.detach(), stat_dtype(a.hidden_ND)
    chunks = LinearRows(hidden_ND, head, stat, a.logits_dtype, a.chunk_bytes, live_N, a.wanted)
    outputs = sweep(chunks, a.rows, a.loss, hidden_ND, any(a.wanted), a.backend)
    return Outputs(*outputs, *chunks.results())


def _fake(a: Arguments) -> Outputs:
    gradients = fake_results(a.hidden_ND, Head.of(a.head), a.wanted)
    return Outputs(*fake_outputs(a.hidden_ND), *gradients)


def _save(ctx: Any, a: Arguments, outputs: Outputs) -> None:
    save_settings(ctx, a.loss, a.backend)
    ctx.wanted = a.wanted
    ctx.save_for_backward(*outputs.gradients())


def _gradients(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 5
    grads = asked(ctx.wanted, ctx.saved_tensors)
    return scaled("linear_policy_loss", ctx, grads, grad_loss)


_registered = register(
    "linear_policy_loss",
    Arguments,
    Outputs,
    _forward,
    _fake,
    results=1,
    save=_save,
    backward=_gradients,
)
