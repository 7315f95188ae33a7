"""Liger-Kernel's fused linear GRPO loss and scaled cross-entropy, with its arguments.

    from fastppo.integrations.liger import FusedLinearGRPOLoss

No Liger-Kernel is needed. With a frozen head a loss costs two GEMMs, and on a CPU the kernels are
C++. The tests hold values, metrics and gradients against Liger-Kernel 0.8.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastppo.integrations.head import logprobs_and_entropy
from fastppo.ops import linear_token_logprobs, losses

# Liger's loss_type -> our aggregation.
AGGREGATION = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}


class FusedLinearGRPOLoss(nn.Module):
    """LigerFusedLinearGRPOLoss: the GRPO family of losses straight from hidden states.

    Args:
        beta: weight of the KL to the reference.
        compiled, chunk_size: taken and not used.
        use_ref_model: whether forward gets `ref_per_token_logps`, or `ref_input` and `ref_weight`.
        epsilon_low, epsilon_high: the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high];
            cispo's ratio to epsilon_high.
        loss_type: grpo, bnpo, dapo, dr_grpo, cispo or sapo.
        max_completion_length: what dr_grpo divides by.
        importance_sampling_level: "token", or "sequence" for GSPO.
        sapo_temperature_pos, sapo_temperature_neg: > 0.
        temperature: of the logits.
        delta: upper bound of the ratio where the advantage is negative, or None.
        use_bias_correction_kl: multiply the KL by the ratio.

    Raises:
        ValueError: luspo and vespo, which are not here, and combinations that Liger refuses.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
    ) -> None:
        super().__init__()
        if loss_type not in AGGREGATION:
            raise ValueError(
                f"FusedLinearGRPOLoss: loss_type must be one of {', '.join(AGGREGATION)}, "
                f"came {loss_type!r}"
            )
        if importance_sampling_level not in ("token", "sequence"):
            raise ValueError(
                "FusedLinearGRPOLoss: importance_sampling_level must be token or sequence, "
                f"came {importance_sampling_level!r}"
            )
        by_sequence = importance_sampling_level == "sequence"
        if by_sequence and loss_type in ("cispo", "sapo"):
            raise ValueError(
                f"FusedLinearGRPOLoss: {loss_type} has a ratio of each token: "
                "importance_sampling_level must be token"
            )
        if by_sequence and use_bias_correction_kl:
            raise ValueError(
                "FusedLinearGRPOLoss: use_bias_correction_kl needs importance_sampling_level token"
            )
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError(
                "FusedLinearGRPOLoss: dr_grpo divides by max_completion_length; set it"
            )
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.mode = AGGREGATION[loss_type]
        self.max_length = max_completion_length
        self.temperature = temperature
        self.use_bias_correction_kl = use_bias_correction_kl
        clips: dict[str, Any] = {"clip_low": epsilon_low, "clip_high": epsilon_high}
        special: dict[str, tuple[Callable[..., losses.TokenLoss], dict[str, Any]]] = {
            "cispo": (losses.cispo, {"clip_low": 1.0, "clip_high": epsilon_high - 1}),
            "sapo": (
                losses.sapo,
                {"tau_pos": sapo_temperature_pos, "tau_neg": sapo_temperature_neg},
            ),
        }
        usual = (losses.gspo if by_sequence else losses.ppo_clip, clips)
        self.surrogate, self.settings = special.get(loss_type, usual)
        if delta is not None and self.settings is clips:
            clips["dual_clip"] = delta

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
            num_items_in_batch: what dapo and cispo divide by, over all processes.
        """
        mask = attention_mask
        logprob = self.logprobs(_input, lin_weight, selected_token_ids, mask, bias)
        found = self.surrogate(logprob, old_per_token_logps, advantages, mask, **self.settings)
        loss, metrics = found.loss, []
        if vllm_is_ratio is not None:
            loss = loss * vllm_is_ratio
        if self.beta != 0:
            ref = ref_per_token_logps
            if ref is None and self.use_ref_model:
                if ref_input is None or ref_weight is None:
                    raise ValueError(
                        "FusedLinearGRPOLoss: give ref_per_token_logps, or ref_input and ref_weight"
                    )
                with torch.no_grad():
                    ref = self.logprobs(ref_input, ref_weight, selected_token_ids, mask, ref_bias)
            corrected: dict[str, Any] = {
                "bias_correction": True,
                "old_logprob": old_per_token_logps,
            }
            kl = losses.kl(
                logprob,
                logprob.detach() if ref is None else ref,
                mask,
                **(corrected if self.use_bias_correction_kl else {}),
            )
            loss = loss + self.beta * kl
            metrics.append(self.mean(kl, mask))
        sign = advantages[:, None].sign()
        clipped = (found.clipped_low & (sign < 0)) | (found.clipped_high & (sign > 0))
        metrics.append(self.mean(clipped.float(), mask))
        return self.total(loss, mask, num_items_in_batch), metrics

    def logprobs(
        self, hidden: Tensor, weight: Tensor, token: Tensor, mask: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Log-probs (B, T) of the tokens inside the mask."""
        return linear_token_logprobs(
            hidden.view(*token.shape, -1),
            weight,
            token,
            bias_V=bias,
            mask=mask != 0,
            temperature=self.temperature,
        ).logprob_N

    def total(self, loss: Tensor, mask: Tensor, items: float | Tensor | None) -> Tensor:
        """The loss of the batch, over all of whose rows Liger's means by sequence go."""
        denominator: float | Tensor
        if self.mode == "token-mean":
            denominator = mask.sum() if items is None else torch.as_tensor(items).to(mask.device)
            denominator = denominator.float().clamp(min=1)
        else:
            denominator = float(len(mask))
        lengths: dict[str, Any] = (
            {"max_length": self.max_length} if self.mode.endswith("norm") else {}
        )
        return losses.aggregate(loss, mask, self.mode, denominator, **lengths)

    @staticmethod
    def mean(x: Tensor, mask: Tensor) -> Tensor:
        """The mean over the tokens inside the mask."""
        return losses.aggregate(x.detach(), mask, "token-sum") / mask.sum().clamp(min=1)


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
