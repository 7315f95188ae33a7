"""Which parameters of a model train: LoRA adapters, some of its layers, or all of it.

LLaMA-Factory's `finetuning_type: lora | freeze | full`, and the adapters that
`adapter_name_or_path` starts from.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from fastppo.config.rewards import split
from fastppo.config.weights import few, find_head
from fastppo.errors import UserError
from fastppo.models.load import LOAD_ERRORS, causal_lm, first_line

if TYPE_CHECKING:
    from fastppo.config import Config

LAYER = re.compile(r"\.(\d+)\.([^.]+)")  # in a parameter's name: number and module of its layer


def comma_list(text: str | None) -> list[str]:
    """The items of a comma-separated list; an empty list for None."""
    return [] if text is None else split(text)


def linear_names(base: nn.Module) -> list[str]:
    """Names of the layers that `lora_target: all` adapts: all linear layers but the output head.

    They are the last parts of the modules' names, sorted. The linear layers of adapters that `base`
    already has are not among them.
    """
    heads = set(base.get_output_embeddings().modules())
    return sorted(
        {
            name.removesuffix(".base_layer").rsplit(".", 1)[-1]
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and module not in heads and ".lora_" not in name
        }
    )


def lora_config(config: Config, base: nn.Module, *, extras: bool = True) -> LoraConfig:
    """PEFT's configuration of a new adapter; with `extras` it also trains `additional_target`."""
    known = linear_names(base)
    if config.lora_target == "all":
        targets = known
    else:
        targets = [name.strip() for name in config.lora_target.split(",")]
        for name in targets:
            if base.get_output_embeddings() is dict(base.named_modules()).get(name):
                raise UserError(
                    f"{config.source}: lora_target: {name}: the output head takes no adapter; "
                    "use additional_target for it, which trains it whole"
                )
            if not any(module == name or module.endswith(f".{name}") for module in known):
                raise UserError(
                    f"{config.source}: lora_target: this model has no linear layer '{name}'; "
                    f"it has {', '.join(known)}"
                )
    layers = None
    if config.lora_layers is not None:
        depth = base.config.num_hidden_layers
        layers = list(range(max(0, depth - config.lora_layers), depth))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.resolved_lora_alpha,
        lora_dropout=config.lora_dropout if config.stage == "rm" else 0.0,
        target_modules=targets,
        layers_to_transform=layers,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=additional_modules(config, base) if extras else None,
    )


def additional_modules(config: Config, base: nn.Module) -> list[str] | None:
    """The modules of `additional_target`: all their weights train and are saved with the adapter.

    Raises:
        UserError: the model has no such module, or its weights are tied or quantised.
    """
    names = comma_list(config.additional_target)
    ends = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    for name in names:
        found = [
            module
            for full, module in base.named_modules()
            if full == name or full.endswith(f".{name}")
        ]
        if not found:
            raise UserError(
                f"{config.source}: additional_target: this model has no module '{name}'; name "
                "one such as embed_tokens, lm_head or norm"
            )
        if tied and any(id(module) in ends for module in found):
            raise UserError(
                f"{config.source}: additional_target: {name}: this model ties its embeddings to "
                "its output head; training one of them would untie the two, and a merged model "
                "would lose it; leave it out"
            )
        if any(not p.is_floating_point() for module in found for p in module.parameters()):
            raise UserError(
                f"{config.source}: additional_target: {name}: its weights are quantised and "
                "cannot train; leave it out, or quantization_bit"
            )
    return names or None


def create_peft_model(
    config: Config, base: nn.Module, name: str = "default", *, extras: bool = True
) -> PeftModel:
    """Wrap `base` in a PEFT model with a new adapter, which changes no output until it trains."""
    model = get_peft_model(base, lora_config(config, base, extras=extras), adapter_name=name)
    set_dora_magnitudes(model, name)
    return model


def add_adapter(config: Config, model: PeftModel, name: str) -> None:
    """Add a new adapter to `model`; it does not train `additional_target`."""
    model.add_adapter(name, lora_config(config, causal_lm(model), extras=False))
    set_dora_magnitudes(model, name)


@torch.no_grad()
def set_dora_magnitudes(model: nn.Module, adapter: str) -> None:
    """Set a new DoRA adapter's magnitudes to the norms of the weights' rows, in float32.

    PEFT rounds the magnitudes to the weights' dtype, but its forward does not round the norms: in
    bfloat16 a new adapter would then change the policy before it is trained.
    """
    for module in model.modules():
        vectors = getattr(module, "lora_magnitude_vector", None)
        if vectors is not None and adapter in vectors:
            weight = dequantize_module_weight(module.base_layer).float()
            vectors[adapter].weight.data = torch.linalg.norm(weight, dim=1)


def load_adapter(model: PeftModel, folder: str, name: str, key: str, **settings: Any) -> None:
    """Add the adapter in `folder` to `model` under `name`; `key` is the setting that named it."""
    try:
        model.load_adapter(folder, adapter_name=name, **settings)
    except LOAD_ERRORS as error:
        raise adapter_error(key, folder, error) from None
    check_adapter_weights(model, folder, name, key)


def load_peft_model(base: nn.Module, folder: str, key: str, *, train: bool) -> PeftModel:
    """Wrap `base` in a PEFT model with the adapter in `folder`, under the name `default`."""
    try:
        model = PeftModel.from_pretrained(base, folder, is_trainable=train)
    except LOAD_ERRORS as error:
        raise adapter_error(key, folder, error) from None
    check_adapter_weights(model, folder, "default", key)
    return model


def check_adapter_weights(model: PeftModel, folder: str, name: str, key: str) -> None:
    """Refuse an adapter whose file has other weights than its place in `model`: PEFT would go on.

    What the file lacks would keep its start, and what the model has no place for, such as the head
    of a classifier's adapter on a language model, would be dropped.
    """
    try:
        saved = {bare(each) for each in load_peft_weights(folder, device="cpu")}
    except LOAD_ERRORS as error:
        raise adapter_error(key, folder, error) from None
    state = model.state_dict()
    places = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=name, save_embedding_layers=False
    )
    wanted = {bare(each) for each in places}
    if wanted - saved:
        raise UserError(
            f"{key}: the adapter in {folder} has no weights for {few(wanted - saved)}; its files "
            "are not one adapter's: fetch or save it again"
        )
    strange = saved - wanted - {bare(each) for each in state}
    if not strange:
        return
    head = find_head(dict.fromkeys(strange, (1, 1)))
    why = "it is a reward model's: name it in reward_model_adapters, with reward_model_type: full"
    cure = why if head is not None else "name one that was trained on the same base"
    raise UserError(
        f"{key}: the adapter in {folder} has weights for {few(strange)}, which this model has no "
        f"place for; {cure}"
    )


def bare(name: str) -> str:
    """An adapter's weight by the name that all versions of PEFT know it by."""
    return name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def adapter_error(key: str, folder: str, error: Exception) -> UserError:
    """The error for an adapter that PEFT cannot load; it shows the first of several mismatches."""
    mismatch = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
    return UserError(
        f"{key}: the adapter in {folder} cannot be loaded "
        f"({mismatch[0][:200] if mismatch else first_line(error)}); name one that was trained on "
        "the same base"
    )


def merge_adapters(base: nn.Module, folders: Iterable[str], key: str) -> nn.Module:
    """`base` with the adapters in `folders` merged into its weights, one after another."""
    for folder in folders:
        base = load_peft_model(base, folder, key, train=False).merge_and_unload(safe_merge=True)
    return base


def disable_input_cast(model: nn.Module) -> None:
    """Stop PEFT from casting the inputs of LoRA layers to the adapter's dtype, except with DoRA.

    On a bfloat16 base PEFT casts the input to float32 and autocast casts it back; the backward
    keeps both copies. Without the cast the products are the same bits. DoRA computes norms in the
    dtype of its input, so its layers keep the cast.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and not any(module.use_dora.values()):
            module.cast_input_dtype_enabled = False


def adapters_to_merge(config: Config) -> list[str]:
    """Folders in `adapter_name_or_path` that are merged into the base: all that do not train."""
    folders = comma_list(config.adapter_name_or_path)
    return folders if config.create_new_adapter else folders[:-1]


def adapter_to_continue(config: Config) -> str | None:
    """The folder whose adapter training continues (`adapter_name_or_path`); None: a new adapter."""
    folders = comma_list(config.adapter_name_or_path)
    return folders[-1] if folders and not config.create_new_adapter else None


def setup_lora_tuning(config: Config, base: nn.Module) -> PeftModel:
    """Set up `finetuning_type: lora`: merge earlier adapters into `base`, add the one that trains.

    The adapter that trains is the last of `adapter_name_or_path`, or a new one.
    """
    base = merge_adapters(base, adapters_to_merge(config), "adapter_name_or_path")
    folder = adapter_to_continue(config)
    if folder is None:
        return create_peft_model(config, base)
    return load_peft_model(base, folder, "adapter_name_or_path", train=True)


def adapter_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """All parameters of one adapter: LoRA matrices, DoRA magnitudes, modules_to_save."""
    return [
        parameter
        for key, parameter in model.named_parameters()
        if f".{adapter}." in key or key.endswith(f".{adapter}")
    ]


def setup_weight_tuning(config: Config, base: nn.Module, kind: str) -> list[nn.Parameter]:
    """Make exactly the parameters that `kind` (`freeze` or `full`) trains require gradients.

    Returns these parameters in the dtype of the base; `upcast_trainable` makes them float32 after a
    frozen copy of the model has been taken.
    """
    names = None if kind == "full" else names_to_train(config, base)
    trainable = [
        parameter for name, parameter in base.named_parameters() if names is None or name in names
    ]
    base.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)
    round_outputs_to_bfloat16(base, trainable)
    return trainable


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
    for name, _ in base.named_parameters():
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


def round_outputs_to_bfloat16(model: nn.Module, trainable: Iterable[nn.Parameter]) -> None:
    """Make norms and embeddings with trainable bfloat16 parameters round their output to bfloat16.

    Call it before `upcast_trainable`. Autocast does not change these modules: with float32 weights
    their output, and then the residual stream, would be float32, and the policy would differ from
    the reference, which runs in bfloat16.
    """
    chosen = set(trainable)
    for module in causal_lm(model).modules():
        trains = any(
            p in chosen for p in module.parameters(recurse=False) if p.dtype == torch.bfloat16
        )
        if trains and not isinstance(module, nn.Linear):
            module.register_forward_hook(_to_bfloat16)


def _to_bfloat16(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    return output.to(torch.bfloat16) if isinstance(output, Tensor) else output


def upcast_trainable(trainable: Iterable[nn.Parameter]) -> None:
    """Cast bfloat16 parameters to float32: bfloat16 would round away an update of 1/1000."""
    for parameter in trainable:
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
