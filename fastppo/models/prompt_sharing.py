"""Before the first step: does the model run a prompt once for all of its responses?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastppo.memory.budgets import PromptSharing
from fastppo.models.load import text_model
from fastppo.models.rounding import LIMITS, relative_error
from fastppo.models.shared_layers import CANNOT_SKIP, first_line
from fastppo.models.shared_prompts import SharedPrompts

if TYPE_CHECKING:
    from fastppo.models.roles import Roles

PROMPT, RESPONSES = 6, (5, 3, 4)  # tokens in the comparison
# Keys of config.json with these words in their name limit what a token sees, unless they are about
# layers: how many have a window, or every how many one has none.
LIMITING, OF_LAYERS = ("window", "chunk"), ("layers", "pattern")


def share_prompts(roles: Roles, input_ids_T: Sequence[int]) -> PromptSharing | None:
    """When prompts that responses share may be run once; None is never, and a note says why.

    Two prompts with several responses run as they are and with each prompt once, in every role.
    Hidden states must be the same to rounding.

    Args:
        input_ids_T: tokens to compare with, of any number.
    """
    try:
        problem = compare_with_rows(roles, input_ids_T)
    except CANNOT_SKIP as error:
        problem = first_line(error)
    if problem:
        kind = roles.base.config.model_type
        roles.notes.append(
            f"prompts that responses share run anew for each: this model ({kind}) does not run "
            f"them once ({problem[:120]})"
        )
        return None
    sizes = [text_model(place.base).config for place in roles.places.values()]
    limits = [limit for config in sizes if (limit := longest_seen(config)) is not None]
    hidden = text_model(roles.base).config.hidden_size
    return PromptSharing(hidden, min(limits, default=None))


def longest_seen(config: object) -> int | None:
    """Tokens of the longest sequence in which every token sees all earlier ones; None is any."""
    found = []
    for name, value in vars(config).items():
        limits = any(word in name for word in LIMITING)
        about_layers = any(word in name for word in OF_LAYERS)
        if limits and not about_layers and type(value) is int and value > 0:
            found.append(value)
    return min(found, default=None)


@torch.no_grad()
def compare_with_rows(roles: Roles, input_ids_T: Sequence[int]) -> str:
    """What is wrong with hidden states of shared prompts, in words; empty if they are the same."""
    for place in roles.places.values():
        if problem := other_attention(place.base):
            return problem
    ids_BT, mask_BT, prompts = compared_rows(input_ids_T, roles.device)
    live_BT = mask_BT.cpu().bool()
    limit = LIMITS[roles.product_precision].log_ratio
    for role in roles.places:
        with roles.use(role):
            wanted, found = (
                roles.hidden(ids_BT, prompts=each).cpu()[live_BT] for each in (None, prompts)
            )
        error = relative_error(found, wanted)
        if not error <= limit:
            return f"{role} off by {error:.2g}"
    return ""


def other_attention(base: Any) -> str:
    """What is wrong with the model's attention, in words; empty if it is PyTorch's."""
    attention = base.config._attn_implementation
    if attention == "sdpa":
        return ""
    return f"it needs PyTorch's attention, and this is {attention}"


def compared_rows(
    input_ids_T: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, SharedPrompts]:
    """Ids and mask of rows with two prompts and different responses to each."""
    longest, count = PROMPT + max(RESPONSES), len(RESPONSES)
    ids = (list(input_ids_T) * (2 * longest))[: 2 * longest]
    rows = []
    for number in range(2 * count):
        prompt = ids[:PROMPT] if number < count else ids[1 : PROMPT + 1]
        rows.append(prompt + ids[number + 2 :][: longest - PROMPT])
    ids_BT = torch.tensor(rows, device=device)
    lengths = [PROMPT + n for n in RESPONSES * 2]
    place_BT = torch.arange(longest, device=device).expand(len(rows), -1)
    mask_BT = (place_BT < torch.tensor(lengths, device=device)[:, None]).long()
    numbers = [0] * count + [1] * count
    prompts = SharedPrompts.of(numbers, [PROMPT] * len(rows), lengths, device)
    return ids_BT, mask_BT, prompts
