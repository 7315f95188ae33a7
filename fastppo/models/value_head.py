"""Value heads: a linear layer from a hidden state to one number, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastppo.config.rewards import HEAD_FILES, split
from fastppo.config.weights import few, find_head, weight_files
from fastppo.errors import UserError
from fastppo.models.load import LOAD_ERRORS, first_line
from fastppo.models.weights import model_folder, model_shapes, read_tensor, shapes_of

if TYPE_CHECKING:
    from fastppo.config import Config

VALUE_HEAD_FILE = HEAD_FILES[0]


def new_value_head(hidden_size: int, device: torch.device) -> nn.Linear:
    """A new head that gives 0 for every state, so that it adds no noise to the first advantages."""
    head = nn.Linear(hidden_size, 1).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def has_value_head(folder: Path) -> bool:
    """Whether `folder` has a value head: in a file of its own, or `v_head` among its weights."""
    if any((folder / name).is_file() for name in HEAD_FILES):
        return True
    try:
        head = find_head(model_shapes(folder if folder.is_dir() else None))
    except LOAD_ERRORS:  # whoever loads the model says what is wrong with it
        return False
    return head is not None and head.module.startswith("v_head")


def value_head_folder(config: Config) -> Path:
    """`value_head_init: model`: where the head that was saved with the policy is.

    Raises:
        UserError: there is none.
    """
    adapters = config.adapter_name_or_path
    name = config.model_name_or_path if adapters is None else split(adapters)[-1]
    folder = model_folder(name, config.cache_dir)
    if folder is None or not has_value_head(folder):
        raise UserError(
            f"{config.source}: value_head_init: model: {name} has no value head (v_head.summary "
            f"among its weights, or {HEAD_FILES[0]}); use reward or zeros"
        )
    return folder


def read_value_head(folder: Path, key: str) -> tuple[Tensor, Tensor]:
    """Weight (1, D) and bias (1,) of the value head in `folder`; a .bin is the second choice.

    It is in a file of its own, as LLaMA-Factory and stage rm write it, or among the weights of the
    model, as TRL's AutoModelForCausalLMWithValueHead does. `key` is the setting that named the
    folder, for the error.
    """
    path = next((folder / name for name in HEAD_FILES if (folder / name).is_file()), None)
    files = [path] if path is not None else weight_files(folder)
    cure = "train one with stage: rm and name its output_dir"
    if not files:
        raise UserError(f"{key}: {folder} has no value head ({HEAD_FILES[0]}); {cure}")
    where = files[0] if len(files) == 1 else folder
    try:
        shapes = shapes_of(files)
        head = find_head(shapes)
        if head is None or (head.bias is None and path is not None):
            raise UserError(f"{key}: {where} has no v_head.summary.weight and .bias; {cure}")
        weight = read_tensor(files, head.weight)
        bias = torch.zeros(1) if head.bias is None else read_tensor(files, head.bias)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{key}: {where} has no v_head.summary.weight and .bias; {cure}") from None
    except LOAD_ERRORS as error:
        raise UserError(f"{key}: {where} cannot be read ({first_line(error)}); {cure}") from None
    if weight.shape[0] != 1 or tuple(bias.shape) != (1,):
        raise UserError(f"{key}: {where} holds no head with one score; {cure}")
    others = set(shapes) - {head.weight, head.bias} if path is not None else set()
    if others:
        raise UserError(f"{key}: {where} holds {few(others)} besides a head; {cure}")
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
    """The head's weight and bias by LLaMA-Factory's names, on the CPU; no bias is written as 0."""
    bias = torch.zeros(1) if head.bias is None else head.bias
    return {
        "v_head.summary.weight": head.weight.detach().cpu().contiguous(),
        "v_head.summary.bias": bias.detach().cpu().contiguous(),
    }
