"""Weights that train themselves: LLaMA-Factory's `finetuning_type: freeze` and `full`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastppo.config.rewards import split
from fastppo.errors import UserError
from fastppo.models.load import causal_lm, text_model

if TYPE_CHECKING:
    from fastppo.config import Config

HALVES = (torch.bfloat16, torch.float16)
LAYER = re.compile(r"\.(\d+)\.([^.]+)")  # in a parameter's name: number and module of its layer


def comma_list(text: str | None) -> list[str]:
    """The items of a comma-separated list; an empty list for None."""
    return [] if text is None else split(text)


def setup_weight_tuning(config: Config, base: nn.Module, kind: str) -> list[nn.Parameter]:
    """Make exactly the parameters that `kind` (`freeze` or `full`) trains require gradients.

    Towers that text never passes are frozen: they would get no gradient. Returns those that train,
    still in the dtype of the base: a frozen copy of the model is taken before `upcast_trainable`
    makes them float32.
    """
    own = text_parameters(base)
    names = own.keys() if kind == "full" else names_to_train(config, base)
    trainable = [parameter for name, parameter in own.items() if name in names]
    base.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)
    round_outputs(base, trainable)
    return trainable


def text_parameters(base: nn.Module) -> dict[str, nn.Parameter]:
    """Full name -> parameter of the text model and the output head, in the model's order."""
    parts = (text_model(base), base.get_output_embeddings())  # a classifier has no second
    inside = {id(p) for part in parts if part is not None for p in part.parameters()}
    return {name: p for name, p in base.named_parameters() if id(p) in inside}


def names_to_train(config: Config, base: nn.Module) -> set[str]:
    """Names of the parameters that `finetuning_type: freeze` trains.

    They are the modules in `freeze_trainable_modules` (`all`, or names such as self_attn and mlp)
    of the last `freeze_trainable_layers` layers (of the first ones if the number is negative), and
    outside the layers the modules in `freeze_extra_modules` (embed_tokens, norm, lm_head).
    """
    depth = base.config.get_text_config().num_hidden_layers
    count = config.freeze_trainable_layers
    layers = range(max(0, depth - count), depth) if count > 0 else range(min(-count, depth))
    inside, outside = parameters_by_module(base)
    wanted = comma_list(config.freeze_trainable_modules)
    extra = comma_list(config.freeze_extra_modules)
    check_module_names(config, "freeze_trainable_modules", wanted, {m for _, m in inside.values()})
    check_module_names(config, "freeze_extra_modules", extra, set(outside.values()))
    return {
        name
        for name, (layer, module) in inside.items()
        if layer in layers and ("all" in wanted or module in wanted)
    } | {name for name, module in outside.items() if module in extra}


def parameters_by_module(base: nn.Module) -> tuple[dict[str, tuple[int, str]], dict[str, str]]:
    """The module that each parameter of `base` belongs to, as two dictionaries.

    The first maps the names of parameters inside layers to (number of the layer, module in it); the
    second maps the names of all other parameters to their module.
    """
    inside, outside = {}, {}
    for name in text_parameters(base):
        match = LAYER.search(name)
        if match is not None:
            inside[name] = (int(match[1]), match[2])
        else:
            outside[name] = name.split(".")[-2]
    return inside, outside


def check_module_names(config: Config, key: str, wanted: list[str], known: set[str]) -> None:
    """Raise UserError if a name in `wanted`, the value of `key`, is no module in `known`."""
    for name in wanted:
        if name != "all" and name not in known:
            raise UserError(
                f"{config.source}: {key}: this model has no '{name}' there; it has "
                f"{', '.join(sorted(known))}"
            )


def frozen_copy(model: nn.Module) -> nn.Module:
    """A frozen copy of the model; it shares the parameters that do not train with the model."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    other = copy.deepcopy(model, memo=dict(shared))
    return other.requires_grad_(False)


def round_outputs(model: nn.Module, trainable: Iterable[nn.Parameter]) -> None:
    """Make norms and embeddings with trainable 16-bit parameters round their output to that dtype.

    Call it before `upcast_trainable`. Autocast does not change these modules: with float32 weights
    their output, and then the residual stream, would be float32, and the policy would differ from
    the reference, which runs in 16 bits.
    """
    chosen = set(trainable)
    for module in causal_lm(model).modules():
        own = [p.dtype for p in module.parameters(recurse=False) if p in chosen]
        halves = [dtype for dtype in own if dtype in HALVES]
        if halves and not isinstance(module, nn.Linear):
            module.register_forward_hook(partial(_round_output, halves[0]))


def _round_output(dtype: torch.dtype, _module: nn.Module, _inputs: Any, output: Any) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) else output


def upcast_trainable(trainable: Iterable[nn.Parameter]) -> None:
    """Cast 16-bit parameters to float32: bfloat16 would round away an update of 1/1000."""
    for parameter in trainable:
        if parameter.dtype in HALVES:
            parameter.data = parameter.data.float()
