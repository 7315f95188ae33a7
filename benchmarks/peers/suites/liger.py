"""Liger-Kernel: its tests of GRPO's losses from hidden states, which hold it against PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.suites import Known, Suite, ours
from fastppo import ops
from fastppo.integrations.grpo import GRPOLoss
from fastppo.integrations.liger import FusedLinearGRPOLoss
from fastppo.ops import losses

# Settings of their autograd function in the order in which `apply` is given them.
POSITIONS = (
    *("beta", "epsilon_low", "epsilon_high", "loss_type", "max_completion_length"),
    *("importance_sampling_level", "sapo_temperature_pos", "sapo_temperature_neg", "temperature"),
    *("compiled", "use_ref_model", "chunk_size"),
)


@ours
def grpo(*tensors_and_settings: Any, **settings: Any) -> tuple[Tensor, list[Tensor]]:
    """In place of their autograd function's `apply`: 11 tensors, then settings."""
    tensors, positional = tensors_and_settings[:11], tensors_and_settings[11:]
    named = dict(zip(POSITIONS, positional, strict=False))
    return GrpoLoss(**named, **settings).run(*tensors)


class GrpoLoss(torch.nn.Module):
    """In place of LigerFusedLinearGRPOLoss, which checks its settings when it is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def run(self, *tensors: Any, **named: Any) -> tuple[Tensor, list[Tensor]]:
        found: tuple[Tensor, list[Tensor]] = FusedLinearGRPOLoss(**self.settings)(*tensors, **named)
        return found

    forward = ours(run)


@ours
def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    reduce: bool = False,
    **named: Any,
) -> Any:
    """The loss from logits, of which the last position is not used."""
    named.setdefault("max_completion_length", completion_ids.shape[1])
    made = GRPOLoss(
        beta=beta, epsilon_low=eps_low, epsilon_high=eps_high, loss_type=loss_type, **named
    )
    last = completion_ids.new_full((len(completion_ids), 1), -100)
    token = torch.cat([completion_ids, last], dim=1)
    logprob = ops.token_logprobs(logits, token, temperature=temperature).logprob_N[:, :-1]
    mask = completion_mask.to(logprob.dtype)
    terms = made.terms(logprob, old_logp, ref_logp, advantages, mask)
    if not reduce:
        return terms.loss, terms.kl, terms.clipped
    return made.total(terms.loss, mask), made.metrics(terms, mask)


@ours
def reduce_loss(
    loss: Tensor, mask: Tensor, loss_type: str, max_completion_length: int | None = None
) -> Tensor:
    """The mean that belongs to a loss_type."""
    if loss_type == "luspo":  # of what it is given, the mean over sequences and positions
        weighted = loss * (mask != 0).sum(1, keepdim=True)
        return losses.aggregate(weighted, torch.ones_like(mask))
    length = max_completion_length or mask.shape[1]
    return GRPOLoss(loss_type=loss_type, max_completion_length=length).total(loss, mask)


class Head:
    """In place of LigerFusedLinearPPOBase, of which two functions are called."""

    @staticmethod
    @ours
    def chunk_forward(
        x: Tensor, weight: Tensor, token: Tensor, bias: Tensor | None = None, temperature: float = 1
    ) -> Tensor:
        found = ops.linear_token_logprobs(x, weight, token, bias_V=bias, temperature=temperature)
        return found.logprob_N

    @staticmethod
    def _compute_dapo_normalizer(mask: Tensor) -> Tensor:
        """Part of what their tests hold us against, not of what they test."""
        return mask.sum().clamp(min=1.0)


SUITE = Suite(
    folder="Liger-Kernel",
    files=("test/chunked_loss/test_grpo_loss.py",),
    path=(".", "src"),
    replaced={
        "LigerFusedLinearGRPOLoss": GrpoLoss,
        "liger_fused_linear_grpo": grpo,
        "triton_grpo_loss": triton_grpo_loss,
        "_reduce_grpo_loss": reduce_loss,
        "LigerFusedLinearPPOBase": Head,
    },
    select="not 8-128-1024-4096",
    why="`test_correctness` and `test_functional_correctness` at their small shape alone; "
    "the large one, 8 x 128 tokens and 4096 words, is left out for its time.",
    conftest=True,
    known=(
        Known(
            r"test_correctness\[.*luspo.*\]",
            "Liger-Kernel's",
            "its luspo lets padding carry the KL and its gradient; ours is 0 outside the mask",
        ),
    ),
)
