"""Log-probs and entropies from hidden states, as the fused heads of other trainers give them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops import linear_token_logprobs


def logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    bias: Tensor | None = None,
    *,
    entropy_grad: bool = False,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """`linear_token_logprobs` whose entropy is differentiable, and costs nothing until it is.

    Trainers ask for entropies in every step and mostly print them. So the entropy's gradient is not
    prepared in the forward, as `entropy_grad=True` does; a backward that reaches it computes the
    logits again (three GEMMs more).

    Args:
        hidden, weight, token, bias: as in `linear_token_logprobs`; without autocast, weight and
            bias are cast to the dtype of the hidden states.
        entropy_grad: whether to prepare the entropy's gradient in the forward (one GEMM more).
        settings: further arguments of `linear_token_logprobs`.

    Returns:
        Log-probs and entropies in nats, of the tokens' shape.
    """
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
    found = linear_token_logprobs(
        hidden, weight, token, bias_V=bias, entropy_grad=entropy_grad, **settings
    )
    if entropy_grad:
        return found.logprob_N, found.entropy_N
    function: Any = _Entropy
    return found.logprob_N, function.apply(found.entropy_N, token, settings, hidden, weight, bias)


class _Entropy(torch.autograd.Function):
    """An entropy that is known, and the gradient that it would have had."""

    @staticmethod
    def forward(
        ctx: Any, entropy: Tensor, token: Tensor, settings: dict[str, Any], *operands: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(token, *operands)
        ctx.settings = settings
        device = entropy.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        return entropy.view_as(entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        token, *operands = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        leaves: list[Any] = [
            x if x is None else x.detach().requires_grad_(asked)
            for x, asked in zip(operands, wanted, strict=True)
        ]
        hidden, weight, bias = leaves
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            entropy = linear_token_logprobs(
                hidden, weight, token, bias_V=bias, entropy_grad=True, **ctx.settings
            ).entropy_N
        differentiable = [x for x in leaves if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(entropy, differentiable, gradient))
        return (None, None, None, *(next(found) if asked else None for asked in wanted))
