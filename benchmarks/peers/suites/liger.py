"""Liger-Kernel: its tests of GRPO's losses from hidden states, which hold it against PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.suites import Known, Suite, ours
from fastppo import ops
from fastppo.integrations import liger
from fastppo.ops import losses

AGGREGATION = {**liger.AGGREGATION, "vespo": "token-mean", "luspo": "seq-mean-token-sum"}
DEFAULTS = {
    "beta": 0.04,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "temperature": 1.0,
    "loss_type": "dapo",
    "max_completion_length": None,
    "importance_sampling_level": "token",
    "use_ref_model": True,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "delta": None,
    "use_bias_correction_kl": False,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}
POSITIONS = (
    *("beta", "epsilon_low", "epsilon_high", "loss_type", "max_completion_length"),
    *("importance_sampling_level", "sapo_temperature_pos", "sapo_temperature_neg", "temperature"),
)


def surrogate(
    logprob: Tensor, old: Tensor | None, advantage: Tensor, mask: Tensor, sampler: Any, s: Any
) -> tuple[Tensor, Tensor]:
    """Our loss of each token, and which of them were clipped."""
    kind, given = s["loss_type"], (logprob, old, advantage, mask)
    by_sequence = s["importance_sampling_level"] == "sequence"
    if by_sequence and kind in ("cispo", "sapo", "vespo"):
        raise ValueError("Sequence-level importance sampling is not supported")
    weight = 1.0 if sampler is None else sampler.reshape(len(mask), -1)
    if kind == "vespo":
        taus = {name: s[f"vespo_{name}"] for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
        if sampler is not None:
            old = logprob.detach() if old is None else old
            share = mask.sum(1, keepdim=True) if weight.shape[1] == 1 else 1
            old = old - weight.log() / share
        found = losses.vespo(logprob, old, advantage, mask, **taus)
        return found.loss, found.clipped_high
    if kind == "sapo":
        tau_pos, tau_neg = s["sapo_temperature_pos"], s["sapo_temperature_neg"]
        found = losses.sapo(*given, tau_pos=tau_pos, tau_neg=tau_neg)
        return weight * found.loss, found.clipped_high
    if kind == "cispo":  # their epsilon_high bounds the ratio itself, here at less than 1
        old = logprob.detach() if old is None else old
        upper = s["epsilon_high"]
        bounded = losses.importance_weights(logprob, old, mask, upper=upper)
        loss = bounded * losses.reinforce(*given).loss
        above = (logprob.detach() - old).exp() > upper
        return weight * loss, above & (advantage[:, None] > 0)
    clip = {"clip_low": s["epsilon_low"], "clip_high": s["epsilon_high"], "dual_clip": s["delta"]}
    found = (losses.gspo if by_sequence else losses.ppo_clip)(*given, **clip)
    return weight * found.loss, found.clipped_low | found.clipped_high


def terms(
    logprob: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    sampler: Any,
    s: Any,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Loss of each token with the KL in it, the KL, and which tokens were clipped."""
    old = None if old is None else old.to(logprob.dtype)
    loss, clipped = surrogate(logprob, old, advantage.to(logprob.dtype), mask, sampler, s)
    if s["beta"] == 0:
        return loss, None, clipped
    ref = logprob.detach() if ref is None else ref
    corrected = {}
    if s["use_bias_correction_kl"]:
        level = s["importance_sampling_level"]
        corrected = {"bias_correction": True, "old_logprob": old, "ratio_level": level}
    # They clamp nothing, and one of their tests has references that are 30 nats away.
    kl = losses.kl(logprob, ref, mask, log_ratio_limit=80.0, **corrected)
    return loss + s["beta"] * kl, kl, clipped


def aggregate(loss: Tensor, mask: Tensor, s: Any, items: float | None = None) -> Tensor:
    """Ours; their number of sequences is that of the batch, rows without a token among them."""
    mode = AGGREGATION[s["loss_type"]]
    norm = {}
    if mode.endswith("norm"):
        norm = {"max_length": float(s["max_completion_length"] or mask.shape[1])}
    rows = float(len(mask)) if mode.startswith("seq") else items
    return losses.aggregate(loss, mask, mode, rows, **norm)


def metrics(kl: Tensor | None, clipped: Tensor, mask: Tensor) -> list[Tensor]:
    """Means over the live tokens: the KL where there is one, and the share of clipped tokens."""
    shares = [] if kl is None else [losses.aggregate(kl.detach(), mask)]
    return [*shares, losses.aggregate(clipped.float(), mask)]


@ours
def grpo(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    mask: Tensor,
    advantage: Tensor,
    bias: Tensor | None = None,
    ref: Tensor | None = None,
    old: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *settings: Any,
    vllm_is_ratio: Tensor | None = None,
    num_items_in_batch: float | None = None,
    **named: Any,
) -> tuple[Tensor, list[Tensor]]:
    """GRPO's loss and metrics: our head, a loss of ours on its log-probs, and our aggregation."""
    s = {**DEFAULTS, **dict(zip(POSITIONS, settings, strict=False)), **named}
    live = mask != 0

    def logprobs(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        found = ops.linear_token_logprobs(
            x, w, token, bias_V=b, mask=live, temperature=s["temperature"]
        )
        return found.logprob_N

    logprob = logprobs(hidden, weight, bias)
    if s["use_ref_model"] and ref is None and ref_input is not None and ref_weight is not None:
        with torch.no_grad():
            ref = logprobs(ref_input, ref_weight, ref_bias)
    loss, kl, clipped = terms(logprob, old, ref, advantage, mask, vllm_is_ratio, s)
    return aggregate(loss, mask, s, num_items_in_batch), metrics(kl, clipped, mask)


class GrpoLoss(torch.nn.Module):
    """In place of LigerFusedLinearGRPOLoss."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, *tensors: Tensor, **named: Any) -> Any:
        return grpo(*tensors, **{**self.settings, **named})


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
    s = {**DEFAULTS, "beta": beta, "epsilon_low": eps_low, "epsilon_high": eps_high, **named}
    s["loss_type"] = loss_type
    last = completion_ids.new_full((len(completion_ids), 1), -100)
    token = torch.cat([completion_ids, last], dim=1)
    logprob = ops.token_logprobs(logits, token, temperature=temperature).logprob_N[:, :-1]
    mask = completion_mask.to(logprob.dtype)
    loss, kl, clipped = terms(logprob, old_logp, ref_logp, advantages, mask, None, s)
    if not reduce:
        return loss, kl, clipped
    return aggregate(loss, mask, s), metrics(kl, clipped, mask)


@ours
def reduce_loss(
    loss: Tensor, mask: Tensor, loss_type: str, max_completion_length: int | None = None
) -> Tensor:
    """The mean that belongs to a loss_type."""
    s = {"loss_type": loss_type, "max_completion_length": max_completion_length}
    if (
        loss_type == "luspo"
    ):  # the mean over the batch's sequences and positions, of what it is given
        weighted = loss * (mask != 0).sum(1, keepdim=True)
        return losses.aggregate(weighted, torch.ones_like(mask))
    return aggregate(loss, mask, s)


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
