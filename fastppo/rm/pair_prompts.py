"""What the two texts of a pair begin with alike, prompt and first words, is run once for both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.memory.budgets import PromptSharing
from fastppo.models.load import causal_lm, text_model
from fastppo.models.prompt_sharing import compared_rows, longest_seen, other_attention
from fastppo.models.rounding import LIMITS, product_precision, relative_error
from fastppo.models.shared_layers import CANNOT_SKIP, first_line
from fastppo.models.shared_prompts import SharedPrompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastppo.config import Config
    from fastppo.rm.model import RewardModel

TWICE = "what the answers of a pair have in common is run for each of them"


def pair_prompts(
    input_ids_2BT: Tensor, mask_2BT: Tensor, sharing: PromptSharing
) -> SharedPrompts | None:
    """How the pairs of a micro-batch run with their beginnings once; None if that saves no work.

    Args:
        input_ids_2BT: right-padded texts, first all chosen ones, then all rejected ones.
        mask_2BT: 1 at live tokens.
    """
    chosen_BT, rejected_BT = input_ids_2BT.chunk(2)
    alike_BT = (chosen_BT == rejected_BT).long().cumprod(1)
    lengths = mask_2BT.sum(1).tolist()
    count = len(chosen_BT)
    shorter = [min(pair) - 1 for pair in zip(lengths[:count], lengths[count:], strict=True)]
    # Each text keeps its last token, which is scored.
    begins = [min(pair) for pair in zip(alike_BT.sum(1).tolist(), shorter, strict=True)]
    most = max(a + b - c for a, b, c in zip(lengths[:count], lengths[count:], begins, strict=True))
    if min(begins) < 1 or not sharing.pays((2 * count, max(lengths)), (count, most)):
        return None
    numbers = [*range(count), *range(count)]
    return SharedPrompts.of(numbers, [*begins, *begins], lengths, input_ids_2BT.device)


def share_pair_prompts(
    config: Config, model: RewardModel, text: Sequence[int]
) -> tuple[PromptSharing | None, list[str]]:
    """When common beginnings of pairs may be run once, or None; and a note.

    Hidden states of a few rows must be the same to rounding.

    Args:
        text: tokens to compare with, of any number.
    """
    if config.quantization_bit == 8:
        return None, [f"{TWICE}: the base is in 8 bits, whose products depend on the batch"]
    if config.finetuning_type == "lora" and config.lora_dropout:
        return None, [f"{TWICE}: lora_dropout draws anew for each"]
    try:
        problem = compare_with_rows(model, text)
    except CANNOT_SKIP as error:
        problem = first_line(error)
    if problem:
        kind = causal_lm(model.model).config.model_type
        return None, [f"{TWICE}: this model ({kind}) does not run it once ({problem[:120]})"]
    shape = text_model(causal_lm(model.model)).config
    note = "what the answers of a pair have in common is run once, where that is less work"
    return PromptSharing(shape.hidden_size, longest_seen(shape)), [note]


@torch.no_grad()
def compare_with_rows(model: RewardModel, text: Sequence[int]) -> str:
    """What is wrong with hidden states of common beginnings, in words; empty if nothing is."""
    if problem := other_attention(causal_lm(model.model)):
        return problem
    device = model.head.weight.device
    ids_BT, mask_BT, prompts = compared_rows(text, device)
    trains = model.training
    model.eval()
    wanted, found = model.hidden(ids_BT, mask_BT), model.hidden(ids_BT, mask_BT, prompts)
    model.train(trains)
    live_BT = mask_BT.bool()
    error = relative_error(prompts.each(found)[live_BT].cpu(), wanted[live_BT].cpu())
    limit = LIMITS[product_precision(device, autocast=model.autocast)].log_ratio
    return "" if error <= limit else f"off by {error:.2g}"
