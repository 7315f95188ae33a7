"""LoRA adapters: create a new one, load those in `adapter_name_or_path`, merge them."""

from __future__ import annotations

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
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastppo.config.weights import few, find_head
from fastppo.errors import UserError
from fastppo.models.load import LOAD_ERRORS, causal_lm, first_line, text_model
from fastppo.models.weight_tuning import LAYER, comma_list, text_parameters

if TYPE_CHECKING:
    from fastppo.config import Config

LINEAR = (nn.Linear, Conv1D)  # GPT-2's layers are Conv1D, a linear layer with a transposed weight


def linear_layers(base: nn.Module) -> dict[str, nn.Module]:
    """All linear layers that text passes, except the output head: full name -> module.

    GPT-2's Conv1D is a linear layer whose weight is transposed. If `base` has adapters already,
    their own linear layers are left out.
    """
    head = base.get_output_embeddings()  # a classifier has none
    text = set(text_model(base).modules()) - set(() if head is None else head.modules())
    return {
        name.removesuffix(".base_layer"): module
        for name, module in base.named_modules()
        if isinstance(module, LINEAR) and module in text and ".lora_" not in name
    }


def lora_targets(config: Config, base: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that `lora_target` names: full name -> module.

    Raises:
        UserError: no linear layer has one of the names, or the name is that of the output head.
    """
    layers = linear_layers(base)
    known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
    if not layers:
        raise UserError(
            f"{config.source}: lora_target: this model ({base.config.model_type}) has no linear "
            "layer that takes an adapter; use finetuning_type: full"
        )
    found = layers
    if config.lora_target != "all":
        found = {}
        for name in (name.strip() for name in config.lora_target.split(",")):
            if base.get_output_embeddings() is dict(base.named_modules()).get(name):
                raise UserError(
                    f"{config.source}: lora_target: {name}: the output head takes no adapter; "
                    "use additional_target for it, which trains it whole"
                )
            named = {full: m for full, m in layers.items() if f".{full}".endswith(f".{name}")}
            if not named:
                raise UserError(
                    f"{config.source}: lora_target: this model has no linear layer '{name}'; "
                    f"it has {known}"
                )
            found |= named
    return found


def experts_note(base: nn.Module, finetuning_type: str) -> list[str]:
    """A note if `finetuning_type: lora` leaves out the experts of a mixture; else an empty list.

    Experts get no adapter, because they are tensors of three dimensions and not linear layers.
    """
    found = text_parameters(base).values()
    experts = sum(p.numel() for p in found if p.dim() == 3)
    if finetuning_type != "lora" or not experts:
        return []
    share = experts / sum(p.numel() for p in found)
    return [f"the experts, {share:.0%} of all parameters, take no adapter and stay as they are"]


def shortest_names(wanted: Iterable[str], base: nn.Module) -> list[str]:
    """Names that PEFT matches to the modules `wanted` and to no others of `base`, sorted.

    PEFT compares a name with the end of each module's full name, so `q_proj` may also match layers
    of a vision tower. In that case the result has full names.
    """
    wanted = {name.removesuffix(".base_layer") for name in wanted}
    every = {name.removesuffix(".base_layer") for name, _ in base.named_modules()}
    ends = {name.rpartition(".")[2] for name in wanted}
    others = (name for name in every - wanted if ".lora_" not in name)
    return sorted(wanted if any(name.rpartition(".")[2] in ends for name in others) else ends)


def lora_config(config: Config, base: nn.Module, *, extras: bool = True) -> LoraConfig:
    """PEFT's configuration of a new adapter; with `extras` it trains `additional_target` too."""
    targets = lora_targets(config, base)
    names, layers = shortest_names(targets, base), None
    if config.lora_layers is not None:
        depth = base.config.get_text_config().num_hidden_layers
        layers = list(range(max(0, depth - config.lora_layers), depth))
        if names[0] in targets and "." in names[0]:  # PEFT ignores `layers` for full names
            numbers = {name: LAYER.search(name) for name in names}
            names = [name for name, n in numbers.items() if n is not None and int(n[1]) in layers]
            layers = None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.resolved_lora_alpha,
        lora_dropout=config.lora_dropout if config.stage == "rm" else 0.0,
        target_modules=names,
        layers_to_transform=layers,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in targets.values()),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=additional_modules(config, base) if extras else None,
    )


def additional_modules(config: Config, base: nn.Module) -> list[str] | None:
    """The modules of `additional_target`: all their weights train and are saved with the adapter.

    Raises:
        UserError: the model has no such module, or its weights are tied or quantised.
    """
    names: list[str] = []
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    ends = {id(embeddings), id(head)}
    tied = embeddings.weight is head.weight
    text = {*text_model(base).modules(), *head.modules()}
    for name in comma_list(config.additional_target):
        ending = {full: m for full, m in base.named_modules() if full.endswith(name)}
        inside = {full: module for full, module in ending.items() if module in text}
        found = [module for full, module in inside.items() if f".{full}".endswith(f".{name}")]
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
        # PEFT would also train modules of a tower whose names end in this one: give full names.
        names += [name] if len(inside) == len(ending) else list(inside)
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
            inputs = 0 if module.fan_in_fan_out else 1
            vectors[adapter].weight.data = torch.linalg.norm(weight, dim=inputs)


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
    """Raise UserError if the weights in an adapter's file are not those of the adapter in `model`.

    PEFT would go on: weights that the file lacks would keep their initial values, and weights that
    the model has no place for would be dropped, such as the head of a classifier's adapter on a
    language model.
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
    """The name of an adapter's weight without the ending that only some versions of PEFT use."""
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
        model = load_peft_model(base, folder, key, train=False)
        try:
            base = model.merge_and_unload(safe_merge=True)
        except (ValueError, AttributeError, NotImplementedError) as error:
            why = "its weights are not finite" if "NaN" in str(error) else first_line(error)
            raise UserError(
                f"{key}: the adapter in {folder} cannot be merged ({why}); name a LoRA adapter of "
                "finite weights"
            ) from None
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

    The adapter that trains is the last of `adapter_name_or_path`, or a new one; of a PeftModel that
    was given it is `default`.
    """
    if isinstance(config.objects.model, PeftModel):
        return config.objects.model
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
