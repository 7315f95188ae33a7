"""Liger-Kernel's fused linear GRPO loss and scaled cross-entropy, with its arguments.

    from fastppo.integrations.liger import FusedLinearGRPOLoss

No Liger-Kernel is needed. With a frozen head a loss costs two GEMMs, and on a CPU the kernels are
C++. The tests hold values, metrics and gradients against Liger-Kernel 0.8.5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastppo.integrations.grpo import GRPOLoss
from fastppo.integrations.head import logprobs_and_entropy
from fastppo.ops import linear_token_logprobs


class FusedLinearGRPOLoss(GRPOLoss, nn.Module):
    """LigerFusedLinearGRPOLoss: the GRPO family of losses straight from hidden states.

    Args:
        use_ref_model: whether forward gets `ref_per_token_logps`, or `ref_input` and `ref_weight`.
        temperature: of the logits.
        others: as in `fastppo.integrations.grpo.GRPOLoss`, in Liger's order.

    Raises:
        ValueError: as `GRPOLoss`.
    """

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        super().__post_init__()

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss and metrics: the mean KL if beta is not 0, and the fraction of clipped tokens.

        Args:
            _input: (B, T, D) hidden states.
            lin_weight, bias: (V, D), (V,).
            selected_token_ids, attention_mask: (B, T).
            advantages: (B,).
            ref_per_token_logps: (B, T); or the reference's `ref_input`, `ref_weight`, `ref_bias`.
            old_per_token_logps: (B, T); None is on-policy.
            vllm_is_ratio: (B, T) or (B, 1) importance weights.
            num_items_in_batch: what dapo, cispo and vespo divide by, over all processes.
        """
        token, mask = selected_token_ids, attention_mask
        ref = ref_per_token_logps
        if ref is None and self.use_ref_model and self.beta != 0:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    "FusedLinearGRPOLoss: give ref_per_token_logps, or ref_input and ref_weight"
                )
            with torch.no_grad():
                ref = self.logprobs(ref_input, ref_weight, token, mask, ref_bias)
        logprob = self.logprobs(_input, lin_weight, token, mask, bias)
        terms = self.terms(logprob, old_per_token_logps, ref, advantages, mask, vllm_is_ratio)
        return self.total(terms.loss, mask, num_items_in_batch), self.metrics(terms, mask)

    def logprobs(
        self, hidden: Tensor, weight: Tensor, token: Tensor, mask: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Log-probs (B, T) of the tokens inside the mask."""
        return linear_token_logprobs(
            hidden.reshape(*token.shape, -1),
            weight,
            token,
            bias_V=bias,
            mask=mask != 0,
            temperature=self.temperature,
        ).logprob_N


def scaled_cross_entropy(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    ignore_index: int = -100,
    m_tiles_per_cluster: int = 1,
    return_entropy: bool = False,
    selected_token_ids: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """LigerFusedLinearScaledCrossEntropyFunction.apply: negative log-probs (M,) of targets.

    Args:
        _input, weight, target: (M, D), (V, D), (M,).
        temperature, ignore_index: as in `linear_token_logprobs`.
        m_tiles_per_cluster: taken and not used.
        return_entropy: whether to give the entropies (M,) too, which are differentiable.
        selected_token_ids: int64 (K,), tokens whose log-probs are wanted of every row, (M, K).

    Returns:
        The negative log-probs; or a tuple of them, the entropies and the selected log-probs.
    """
    settings: dict[str, Any] = {"temperature": temperature, "ignore_index": ignore_index}
    if selected_token_ids is None:
        logprob, entropy = logprobs_and_entropy(_input, weight, target, **settings)
        return (-logprob, entropy) if return_entropy else -logprob
    ignored = target == ignore_index
    labels = torch.cat([target[:, None], selected_token_ids.expand(len(target), -1)], 1)
    found = linear_token_logprobs(
        _input, weight, labels, mask=~ignored, entropy_grad=return_entropy, **settings
    )
    nll, selected = -found.logprob_N[:, 0], found.logprob_N[:, 1:]
    return (nll, found.entropy_N, selected) if return_entropy else (nll, selected)
