"""Value heads: a linear layer from a hidden state to one number, in float32."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastppo.config.rewards import HEAD_FILES
from fastppo.errors import UserError
from fastppo.models.load import LOAD_ERRORS, first_line

VALUE_HEAD_FILE = HEAD_FILES[0]


def new_value_head(hidden_size: int, device: torch.device) -> nn.Linear:
    """A new head that gives 0 for every state, so that it adds no noise to the first advantages."""
    head = nn.Linear(hidden_size, 1).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def read_value_head(folder: Path, key: str) -> tuple[Tensor, Tensor]:
    """Weight (1, D) and bias (1,) of the value head in `folder`; a .bin is the second choice.

    `key` is the setting that named the folder, for the error.
    """
    path = next((folder / name for name in HEAD_FILES if (folder / name).is_file()), None)
    cure = "train one with stage: rm and name its output_dir"
    if path is None:
        raise UserError(f"{key}: {folder} has no value head ({HEAD_FILES[0]}); {cure}")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:  # weights_only: a pickle cannot run code
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        weight, bias = tensors["v_head.summary.weight"], tensors["v_head.summary.bias"]
        shapes = weight.dim(), tuple(bias.shape)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{key}: {path} has no v_head.summary.weight and .bias; {cure}") from None
    except LOAD_ERRORS as error:
        raise UserError(f"{key}: {path} cannot be read ({first_line(error)}); {cure}") from None
    if shapes != (2, (1,)):
        raise UserError(f"{key}: {path} holds no head with one score; {cure}")
    return weight, bias


def load_value_head(
    folder: Path, hidden_size: int, device: torch.device, key: str = "reward_model"
) -> nn.Linear:
    """The value head that stage rm or LLaMA-Factory saved in `folder`, on `device`."""
    weight, bias = read_value_head(folder, key)
    if weight.shape != (1, hidden_size):
        raise UserError(
            f"{key} {folder}: its head is for hidden size {weight.shape[-1]}, the base has "
            f"{hidden_size}; train it on the same model_name_or_path"
        )
    head = new_value_head(hidden_size, device)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head


def value_head_state(head: nn.Linear) -> dict[str, Tensor]:
    """The head's weight and bias by LLaMA-Factory's names, on the CPU."""
    return {
        "v_head.summary.weight": head.weight.detach().cpu().contiguous(),
        "v_head.summary.bias": head.bias.detach().cpu().contiguous(),
    }
