"""What of a model trains: LoRA adapters, some of its layers, or all of it; and from where.

LLaMA-Factory's `finetuning_type: lora | freeze | full`, and its `adapter_name_or_path`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from fastppo.config.rewards import split
from fastppo.errors import UserError
from fastppo.models.load import LOAD_ERRORS, causal_lm, first_line

if TYPE_CHECKING:
    from fastppo.config import Config

LAYER = re.compile(r"\.\d+\.")


def comma_list(text: str | None) -> list[str]:
    """The items of one of LLaMA-Factory's comma lists; none for None."""
    return [] if text is None else split(text)


def linear_names(base: nn.Module) -> list[str]:
    """`lora_target: all`: every linear layer by its last name, never the output head.

    Of a base that has adapters already, the layers below them and not the adapters.
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
    """A new adapter as the YAML asks for it; `extras` are the modules of `additional_target`."""
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
    """`additional_target`: modules that train whole beside the adapter and are saved with it."""
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
    """`base` under a new adapter that says what the base says."""
    model = get_peft_model(base, lora_config(config, base, extras=extras), adapter_name=name)
    set_dora_magnitudes(model, name)
    return model


def add_adapter(config: Config, model: PeftModel, name: str) -> None:
    """Another new adapter beside those that `model` has; without `additional_target`."""
    model.add_adapter(name, lora_config(config, causal_lm(model), extras=False))
    set_dora_magnitudes(model, name)


@torch.no_grad()
def set_dora_magnitudes(model: nn.Module, adapter: str) -> None:
    """A new DoRA adapter's magnitudes are its weights' norms in float32, as its forward takes them.

    PEFT rounds them to the weights' dtype: in bfloat16 a new adapter would change the policy.
    """
    for module in model.modules():
        vectors = getattr(module, "lora_magnitude_vector", None)
        if vectors is not None and adapter in vectors:
            weight = dequantize_module_weight(module.base_layer).float()
            vectors[adapter].weight.data = torch.linalg.norm(weight, dim=1)


def load_adapter(model: PeftModel, folder: str, name: str, key: str, **settings: Any) -> None:
    """Hang an adapter from disk on `model`, or say in one line why it does not fit."""
    try:
        model.load_adapter(folder, adapter_name=name, **settings)
    except LOAD_ERRORS as error:
        raise adapter_error(key, folder, error) from None


def load_peft_model(base: nn.Module, folder: str, key: str, *, train: bool) -> PeftModel:
    """`base` under the adapter from `folder`, as `default`."""
    try:
        return PeftModel.from_pretrained(base, folder, is_trainable=train)
    except LOAD_ERRORS as error:
        raise adapter_error(key, folder, error) from None


def adapter_error(key: str, folder: str, error: Exception) -> UserError:
    """What PEFT said: of a list of tensors that differ, the first."""
    mismatch = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
    return UserError(
        f"{key}: the adapter in {folder} cannot be loaded "
        f"({mismatch[0][:200] if mismatch else first_line(error)}); name one that was trained on "
        "the same base"
    )


def merge_adapters(base: nn.Module, folders: Iterable[str], key: str) -> nn.Module:
    """`base` with adapters added to its weights for good, in their order."""
    for folder in folders:
        base = load_peft_model(base, folder, key, train=False).merge_and_unload(safe_merge=True)
    return base


def disable_input_cast(model: nn.Module) -> None:
    """Adapters take their input as it is: autocast would cast back what PEFT made float32.

    Of a bfloat16 base that is a copy of each adapted layer's input in 4 bytes and one in 2, which
    the backward keeps; the products are the same to the bit. DoRA computes norms in the dtype of
    its input, so there the cast stays.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and not any(module.use_dora.values()):
            module.cast_input_dtype_enabled = False


def adapters_to_merge(config: Config) -> list[str]:
    """Those of `adapter_name_or_path` that become part of the base."""
    folders = comma_list(config.adapter_name_or_path)
    return folders if config.create_new_adapter else folders[:-1]


def adapter_to_continue(config: Config) -> str | None:
    """The one of `adapter_name_or_path` that goes on training."""
    folders = comma_list(config.adapter_name_or_path)
    return folders[-1] if folders and not config.create_new_adapter else None


def setup_lora_tuning(config: Config, base: nn.Module) -> PeftModel:
    """`finetuning_type: lora`: earlier adapters merged, the last one continued, or a new one."""
    base = merge_adapters(base, adapters_to_merge(config), "adapter_name_or_path")
    goes_on = adapter_to_continue(config)
    if goes_on is None:
        return create_peft_model(config, base)
    return load_peft_model(base, goes_on, "adapter_name_or_path", train=True)


def adapter_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """Every parameter of one adapter: its LoRA matrices, magnitudes and whole modules."""
    return [
        parameter
        for key, parameter in model.named_parameters()
        if f".{adapter}." in key or key.endswith(f".{adapter}")
    ]


def setup_weight_tuning(config: Config, base: nn.Module, kind: str) -> list[nn.Parameter]:
    """The parameters of `base` that `finetuning_type: freeze` or `full` trains; only they do.

    They are in the dtype of the base still, so that a frozen copy can be taken first.
    """
    names = None if kind == "full" else names_to_train(config, base)
    trained = [
        parameter for name, parameter in base.named_parameters() if names is None or name in names
    ]
    base.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    round_outputs_to_bfloat16(base, trained)
    return trained


def names_to_train(config: Config, base: nn.Module) -> set[str]:
    """Names of the parameters that `finetuning_type: freeze` trains.

    The last `freeze_trainable_layers` layers, or the first where it is negative; of each the
    modules in `freeze_trainable_modules` (`all`, or names such as self_attn and mlp); and outside
    the layers those in `freeze_extra_modules` (embed_tokens, norm, lm_head).
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
    """Parameters within layers by their layer and module in it; others by their module."""
    inside, outside = {}, {}
    for name, _ in base.named_parameters():
        if LAYER.search(name):
            match = re.search(r"\.(\d+)\.([^.]+)", name)
            assert match is not None
            inside[name] = (int(match[1]), match[2])
        else:
            outside[name] = name.split(".")[-2]
    return inside, outside


def check_module_names(config: Config, key: str, wanted: list[str], known: set[str]) -> None:
    """Refuse the name of a module that the model has not."""
    for name in wanted:
        if name != "all" and name not in known:
            raise UserError(
                f"{config.source}: {key}: this model has no '{name}' there; it has "
                f"{', '.join(sorted(known))}"
            )


def frozen_copy(model: nn.Module) -> nn.Module:
    """The model as it is now, for good; what does not train is shared and costs nothing."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    other = copy.deepcopy(model, memo=dict(shared))
    return other.requires_grad_(False)


def round_outputs_to_bfloat16(model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """Round what modules with a trained bfloat16 parameter give; before any of it is upcast.

    Norms and embeddings are outside autocast: float32 weights in them would carry on a float32
    residual stream, and say something else than the reference's bfloat16.
    """
    chosen = set(trained)
    for module in causal_lm(model).modules():
        own = any(
            p in chosen for p in module.parameters(recurse=False) if p.dtype == torch.bfloat16
        )
        if own and not isinstance(module, nn.Linear):
            module.register_forward_hook(_to_bfloat16)


def _to_bfloat16(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    return output.to(torch.bfloat16) if isinstance(output, Tensor) else output


def upcast_trainable(trained: Iterable[nn.Parameter]) -> None:
    """Trained parameters to float32: in bfloat16 an update of a thousandth is rounded away."""
    for parameter in trained:
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
