"""A reward model, its loss on pairs, the calibration of its scores, and a copy of its weights."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastppo.models.load import trunk
from fastppo.rm.pair_prompts import pair_prompts

if TYPE_CHECKING:
    from fastppo.memory.budgets import PromptSharing
    from fastppo.models.shared_prompts import SharedPrompts
    from fastppo.rm.lower_layers import LowerLayers


class RewardModel(nn.Module):
    """A trunk (with LoRA, or trained itself) and a linear head, read at the last token."""

    def __init__(self, model: Any, head: nn.Linear, *, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.head, self.autocast = model, head, autocast
        self.lower: LowerLayers | None = None  # frozen ones that run once a text
        self.sharing: PromptSharing | None = None  # when common beginnings of pairs run once

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor, prompts: SharedPrompts | None = None
    ) -> Tensor:
        """The last hidden states (B, T, D) of right-padded sequences; of `prompts` (G, S, D)."""
        half, given = self.autocast, {}
        if prompts is not None:
            input_ids, attention_mask = prompts.once(input_ids), prompts.mask()
            given = {"position_ids": prompts.position_GS}
        with torch.autocast(input_ids.device.type, dtype=half, enabled=half is not None):
            hidden_BTD: Tensor = trunk(self.model)(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **given
            ).last_hidden_state
        return hidden_BTD

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores (2B,) float32 of pairs: right-padded, the chosen texts and then the rejected."""
        lower, prompts = self.lower, None
        if lower is None and self.sharing is not None:
            prompts = pair_prompts(input_ids, attention_mask, self.sharing)
        with nullcontext() if lower is None else lower.context(input_ids, attention_mask):
            hidden_BTD = self.hidden(input_ids, attention_mask, prompts)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        if prompts is None:
            last_BD = hidden_BTD[rows, attention_mask.sum(1) - 1]
        else:
            place_B = prompts.back_M.view(prompts.shape)[rows, attention_mask.sum(1) - 1]
            last_BD = hidden_BTD.flatten(0, 1)[place_B]
        # The loss is of differences, so a bias has no gradient but rounding, which Adam would make
        # a step of learning_rate: a score that a classifier without a bias could not give.
        weight, bias = self.head.weight, self.head.bias.detach()
        score_B: Tensor = nn.functional.linear(last_BD.float(), weight, bias).squeeze(-1)
        return score_B


def pair_loss(score_2B: Tensor) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected); the first half of the scores are the chosen ones.

    Source: Ouyang et al. 2022, Training language models to follow instructions, equation 1.
    """
    chosen_B, rejected_B = score_2B.chunk(2)
    return -nn.functional.logsigmoid(chosen_B - rejected_B).mean()


@torch.no_grad()
def calibrate(head: nn.Linear, score_N: Tensor) -> None:
    """Shift and scale the head so that these scores have mean 0 and standard deviation 1.

    The order of the scores does not change. With calibrated scores, beta means the same for every
    reward model.
    Source: Huang et al. 2024, The N+ Implementation Details of RLHF with PPO, detail on normalising
    the reward model's output.
    """
    mean, std = score_N.mean(), score_N.std().clamp_min(1e-6)
    head.bias.copy_((head.bias - mean) / std)
    head.weight.div_(std)


class ParameterCopy:
    """Host copy of the trainable parameters, restored if training is retried."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.values = [p.detach().to("cpu", copy=True) for p in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the values back, and delete the gradients."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.copy_(value)
            parameter.grad = None
