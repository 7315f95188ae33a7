"""The GRPO family of losses from log-probs, by Liger-Kernel's names and settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.ops import losses

# Liger's loss_type -> our aggregation.
AGGREGATION = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "vespo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
}
# Liger clamps no KL; a larger log ratio than this would overflow float32.
KL_LOG_RATIO_LIMIT = 80.0


class GRPOTerms(NamedTuple):
    """Of each token (B, T): surrogate plus beta times KL, 0 outside the mask; the KL in nats, None
    where beta is 0; and whether the clip took its gradient."""

    loss: Tensor
    kl: Tensor | None
    clipped: Tensor


@dataclass(eq=False)
class GRPOLoss:
    """One of Liger-Kernel's GRPO losses as a function of log-probs, by Liger's arguments.

    Args:
        beta: weight of the KL to the reference.
        compiled, chunk_size: taken and not used.
        use_ref_model, temperature: of hidden states, see `liger.FusedLinearGRPOLoss`.
        epsilon_low, epsilon_high: the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high];
            cispo's ratio to epsilon_high.
        loss_type: a key of AGGREGATION.
        max_completion_length: what dr_grpo divides by.
        importance_sampling_level: "token", or "sequence" for GSPO and luspo.
        sapo_temperature_pos, sapo_temperature_neg: > 0.
        delta: upper bound of the ratio where the advantage is negative, or None.
        use_bias_correction_kl: multiply the KL by the ratio.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: > 0, as in `losses.vespo`.

    Raises:
        ValueError: an unknown name, and combinations that have no meaning.
    """

    beta: float = 0.04
    compiled: bool = True
    use_ref_model: bool = True
    chunk_size: int = 1
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    loss_type: str = "dapo"
    max_completion_length: int | None = None
    importance_sampling_level: str = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    temperature: float = 1.0
    delta: float | None = None
    use_bias_correction_kl: bool = False
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        kind, level = self.loss_type, self.importance_sampling_level
        wrong = None
        if kind not in AGGREGATION:
            wrong = f"loss_type must be one of {', '.join(AGGREGATION)}, came {kind!r}"
        elif level not in ("token", "sequence"):
            wrong = f"importance_sampling_level must be token or sequence, came {level!r}"
        elif level == "sequence" and kind in ("cispo", "sapo", "vespo"):
            wrong = "Sequence-level importance sampling is not supported for loss_type "
            wrong += f"{kind!r}; set importance_sampling_level='token'"
        elif level == "token" and kind == "luspo":
            wrong = "luspo has one ratio a sequence; set importance_sampling_level='sequence'"
        elif kind == "dr_grpo" and self.max_completion_length is None:
            wrong = "dr_grpo divides by max_completion_length; set it"
        if wrong is not None:
            raise ValueError(f"GRPO loss: {wrong}")

    def terms(
        self,
        logprob: Tensor,
        old_logprob: Tensor | None,
        ref_logprob: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        sampler_ratio: Tensor | None = None,
    ) -> GRPOTerms:
        """Loss, KL and clipped tokens.

        Args:
            logprob, mask: (B, T).
            old_logprob: (B, T); None is on-policy.
            ref_logprob: (B, T); None is the policy itself, whose KL is 0.
            advantages: (B,).
            sampler_ratio: (B, T), (B, 1) or (B,) importance weights, or None.
        """
        ratio = None if sampler_ratio is None else sampler_ratio.reshape(len(mask), -1)
        found = self._surrogate(logprob, old_logprob, advantages, mask, ratio)
        clipped = found.clipped_low | found.clipped_high
        if self.beta == 0:
            return GRPOTerms(found.loss, None, clipped)
        corrected: dict[str, Any] = {}
        if self.use_bias_correction_kl:
            level = self.importance_sampling_level
            corrected = {"bias_correction": True, "old_logprob": old_logprob, "ratio_level": level}
        ref = logprob.detach() if ref_logprob is None else ref_logprob
        kl = losses.kl(logprob, ref, mask, log_ratio_limit=KL_LOG_RATIO_LIMIT, **corrected)
        return GRPOTerms(found.loss + self.beta * kl, kl, clipped)

    def _surrogate(
        self,
        logprob: Tensor,
        old: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        ratio: Tensor | None,
    ) -> losses.TokenLoss:
        """The policy's loss of each token, with the sampler's ratio in it."""
        behaviour = logprob.detach() if old is None else old
        if self.loss_type == "vespo":  # whose weight of a sequence has the sampler's ratio in it
            if ratio is not None:
                tokens = (mask != 0).sum(1, keepdim=True) if ratio.shape[1] == 1 else 1
                old = behaviour - ratio.log() / tokens
            names = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
            shape = {name: getattr(self, f"vespo_{name}") for name in names}
            return losses.vespo(logprob, old, advantages, mask, **shape)
        if self.loss_type == "sapo":
            taus = {"tau_pos": self.sapo_temperature_pos, "tau_neg": self.sapo_temperature_neg}
            found = losses.sapo(logprob, old, advantages, mask, **taus)
        elif self.loss_type == "cispo":  # epsilon_high bounds the ratio itself, and may be below 1
            weight = losses.importance_weights(logprob, behaviour, mask, upper=self.epsilon_high)
            above = (logprob.detach() - behaviour).exp() > self.epsilon_high
            found = losses.reinforce(logprob, old, advantages, mask)
            clipped = above & (mask != 0) & (advantages[:, None] > 0)
            found = found._replace(loss=weight * found.loss, clipped_high=clipped)
        else:
            by_sequence = self.importance_sampling_level == "sequence"
            low, high = self.epsilon_low, self.epsilon_high
            found = (losses.gspo if by_sequence else losses.ppo_clip)(
                logprob, old, advantages, mask, clip_low=low, clip_high=high, dual_clip=self.delta
            )
        return found if ratio is None else found._replace(loss=found.loss * ratio)

    def total(self, loss: Tensor, mask: Tensor, items: float | Tensor | None = None) -> Tensor:
        """The loss of the batch, a scalar; means over sequences count rows without tokens, too.

        Args:
            loss, mask: (B, T).
            items: number of tokens that dapo, cispo and vespo divide by; None is this batch's. bnpo
                divides by this batch's in any case, which is all that it differs in from dapo.
        """
        mode = AGGREGATION[self.loss_type]
        length = self.max_completion_length if mode == "seq-mean-token-sum-norm" else None
        count: float | Tensor | None = None
        if mode != "token-mean":
            count = float(len(mask))
        elif items is not None and self.loss_type != "bnpo":
            count = torch.as_tensor(items, dtype=torch.float32, device=mask.device).clamp(min=1)
        return losses.aggregate(loss, mask, mode, count, max_length=length)

    @staticmethod
    def metrics(terms: GRPOTerms, mask: Tensor) -> list[Tensor]:
        """Means over the live tokens: the KL where there is one, and the share of clipped ones."""
        shares = [] if terms.kl is None else [losses.aggregate(terms.kl.detach(), mask)]
        return [*shares, losses.aggregate(terms.clipped.float(), mask)]
