"""Scores by a separate reward model: a sequence classifier, or a causal LM with a value head."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from peft import PeftModel, load_peft_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from fastppo import packages
from fastppo.config.rewards import HEAD_FILES, split
from fastppo.config.weights import Head, find_head, weight_files
from fastppo.errors import UserError, note
from fastppo.memory.budgets import Budget
from fastppo.models.adapters import check_adapter_weights
from fastppo.models.batch import Batch
from fastppo.models.load import (
    LOAD_ERRORS,
    attention_implementation,
    causal_lm,
    check_same_tokens,
    compute_dtype,
    first_line,
    hidden_size,
    load_config,
    load_tokenizer,
    not_loaded,
    text_model,
)
from fastppo.models.load import trunk as model_trunk
from fastppo.models.value_head import has_value_head, load_value_head, new_value_head
from fastppo.models.weights import (
    forget_pad_token,
    from_pretrained,
    is_adapter,
    left_out_line,
    model_folder,
    read_tensor,
    shapes_of,
    vocabulary_size,
)
from fastppo.offload.activations import find_layers
from fastppo.offload.frozen import place_frozen
from fastppo.rewards.adapter import HeadReward
from fastppo.rewards.classifier import ClassifierReward, is_openrlhf

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.templates import Template

Placed = TypeVar("Placed", bound=nn.Module)


def adapters_of(config: Config) -> list[str]:
    """The folders in `reward_model_adapters`, as a list."""
    return split(config.reward_model_adapters) if config.reward_model_adapters else []


def head_folder(name: str, config: Config) -> Path | None:
    """The folder that has a value head: the last adapter's, or the model's; else None."""
    for path in adapters_of(config)[-1:]:
        if has_value_head(Path(path)):  # TRL's is in a pytorch_model.bin beside the adapter
            return Path(path)
    return Path(name) if any((Path(name) / file).is_file() for file in HEAD_FILES) else None


def load_full(
    name: str,
    config: Config,
    device: torch.device,
    template: Template,
    budget: Budget | None = None,
) -> ClassifierReward | HeadReward:
    """Load the reward model `name` (`reward_model_type: full`), frozen, in the run's dtype.

    If its folder has a value head, as LLaMA-Factory saves it, it is a causal LM that scores the
    policy's own tokens. Otherwise it must be a sequence classifier with one label.
    """
    budget = budget or Budget.of(config, scoring=True)
    if name in config.objects.rewards:
        return given_reward(name, config, device, template, budget)
    folder = head_folder(name, config)
    found = None
    if folder is None:
        try:
            found = find_weights(name, config)
        except LOAD_ERRORS as error:
            if is_adapter(name, config.cache_dir):
                raise adapter_error(name) from None
            raise load_error(name, error, config) from None
        if found.has_value_head:
            folder = found.files[0].parent
    if folder is None:
        assert found is not None
        model, bias = load_classifier(name, config, device, found)
        model.config.use_cache = False
        own = load_own_tokenizer(name, config)
        if not getattr(own, "chat_template", None):
            raise UserError(
                f"reward_model: the tokenizer of {name} has no chat template to write the "
                "conversation with; put a chat_template.jinja beside it"
            )
        placed = place_on_device(model, config, device, model)
        return ClassifierReward(placed, own, name, budget, bias=bias)
    model, unexpected = load_model(AutoModelForCausalLM, name, config, device)
    inner = causal_lm(model)
    cure = "train it on the same base, or name a sequence classifier"
    check_same_tokens(config, "reward_model", name, inner, cure)
    # Only the trunk: its output head is not needed.
    trunk = place_on_device(model_trunk(inner), config, device, inner)
    head = load_value_head(folder, hidden_size(inner), device)
    head.requires_grad_(False)
    note_left_out(name, {x for x in unexpected if not x.startswith("v_head.")}, inner)

    def hidden(batch: Batch) -> Tensor:
        inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.mask_BT}
        hidden_BTD: Tensor = trunk(**inputs, use_cache=False).last_hidden_state
        return hidden_BTD

    # Always padded: padding_free was checked for the policy's attention, not for this model's.
    return HeadReward(hidden, head, folder, template, budget, packs=False)


def given_reward(
    name: str, config: Config, device: torch.device, template: Template, budget: Budget
) -> HeadReward:
    """A model that was given as an object: its head scores the policy's own tokens, at EOS."""
    model, score = config.objects.rewards[name]
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < min(len(load_tokenizer(config)), vocabulary_size(load_config(config))):
        raise UserError(
            f"reward_model: {name} has embeddings for {rows} tokens, fewer than the policy's "
            "tokenizer; give one with the same tokenizer, or its folder by name, which is read "
            "with its own"
        )
    model.requires_grad_(False).eval()
    trunk = place_on_device(model_trunk(model), config, device, model)
    head = new_value_head(score.weight.shape[-1], device)
    head.load_state_dict(read_head(score))
    head.requires_grad_(False)

    def hidden(batch: Batch) -> Tensor:
        inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.mask_BT}
        hidden_BTD: Tensor = trunk(**inputs, use_cache=False).last_hidden_state
        return hidden_BTD

    return HeadReward(hidden, head, None, template, budget, packs=False)


def read_head(score: nn.Linear) -> dict[str, Tensor]:
    """Weight and bias of a classifier's score; without a bias it is 0."""
    bias = torch.zeros(1) if score.bias is None else score.bias
    return {"weight": score.weight.detach(), "bias": bias.detach()}


@dataclass(frozen=True)
class RewardWeights:
    """What the files of a reward model hold, whatever its config says or leaves out."""

    config: Any  # transformers'
    files: tuple[Path, ...]
    head: Head | None  # in the model's own files
    adapter_head: Head | None  # in those of its last adapter that has one

    @property
    def has_value_head(self) -> bool:
        """Whether it is a causal LM with a value head among its weights, as TRL saves them."""
        head = self.head
        if head is None or self.adapter_head is not None or is_openrlhf(self.config):
            return False
        return head.module in ("v_head.summary", "v_head")

    @property
    def labels(self) -> int:
        """How many scores it gives: the weights say so, and the config of a classifier without."""
        head = self.adapter_head or self.head
        if head is not None:
            return head.rows
        classes = self.config.architectures or ()
        is_classifier = any("SequenceClassification" in kind for kind in classes)
        return int(self.config.num_labels) if is_classifier else 1  # refused for want of a head


def find_weights(name: str, config: Config) -> RewardWeights:
    """Look into the files of the reward model `name` and of its adapters for a head."""
    settings = AutoConfig.from_pretrained(
        name, cache_dir=config.cache_dir, trust_remote_code=config.trust_remote_code
    )
    folder = model_folder(name, config.cache_dir)
    files = () if folder is None else tuple(weight_files(folder))
    prefix = getattr(settings, "value_head_prefix", None)
    found = None
    for adapter in adapters_of(config):
        tensors = load_peft_weights(adapter, device="cpu")
        found = find_head({k: tuple(x.shape) for k, x in tensors.items()}) or found
    return RewardWeights(settings, files, find_head(shapes_of(files), prefix), found)


def load_classifier(
    name: str, config: Config, device: torch.device, found: RewardWeights
) -> tuple[PreTrainedModel, float]:
    """The classifier `name` with one label, and the bias of its head where its class takes none.

    A head that its class has under another name is put in its place.
    """
    if found.labels != 1:
        raise UserError(
            f"reward_model: {name} has {found.labels} labels, and a score is one number; name a "
            "classifier with num_labels 1"
        )
    settings, bias = found.config, 0.0
    settings.num_labels = 1
    kind = AutoModelForSequenceClassification
    head = found.head
    taken: dict[str, Tensor] = {}
    if head is not None and found.adapter_head is None:
        names = [head.weight, *([head.bias] if head.bias else [])]
        taken = {each: read_tensor(found.files, each) for each in names}
    model, unexpected = load_model(kind, name, config, device, settings, taken)
    left = set(unexpected)
    if head is not None and head.bias in left and found.adapter_head is None:
        bias = float(taken[str(head.bias)].item())
        left.discard(str(head.bias))
    if head is not None:
        left.discard(head.weight)
    note_left_out(name, left, causal_lm(model))
    return model, bias


def load_error(name: str, error: Exception, config: Config) -> UserError:
    """The error for a reward model that cannot be loaded."""
    return UserError(f"reward_model: {not_loaded(name, error, config.flash_attn)}")


def adapter_error(name: str) -> UserError:
    """The error for an adapter where a model should be."""
    return UserError(
        f"reward_model: {name} is an adapter; name its base here, and the adapter in "
        "reward_model_adapters"
    )


def note_left_out(name: str, unexpected: Iterable[str], model: nn.Module) -> None:
    """Print a note on weights that the model had no place for."""
    line = left_out_line(name, unexpected, type(model).__name__)
    if line is not None:
        note(f"reward_model: {line}")


def load_model(
    kind: Any,
    name: str,
    config: Config,
    device: torch.device,
    settings: Any = None,
    head: Mapping[str, Tensor] | None = None,
) -> tuple[Any, set[str]]:
    """Load a model with `reward_model_adapters` merged into it, frozen and in evaluation mode.

    The model is in host memory; if it is quantised, it is on `device` and its adapters are not
    merged.

    Args:
        kind: the transformers class that loads it.
        settings: its config, if that is not the one in its folder.
        head: the tensors of its head, for a class that has the head under another name.

    Returns:
        The model, and the names of the weights that it had no place for.

    Raises:
        UserError: the model or an adapter cannot be loaded, or a weight is in no file.
    """
    dtype = compute_dtype(config, device)
    own: dict[str, Any] = {}
    if config.flash_attn != "auto":  # auto: transformers chooses, as not all classifiers have sdpa
        own["attn_implementation"] = attention_implementation(config.flash_attn, device, dtype)
    bits = config.reward_model_quantization_bit
    if bits is not None:
        own |= quantisation(bits, device, dtype)
    try:
        if settings is None:
            settings = AutoConfig.from_pretrained(
                name, cache_dir=config.cache_dir, trust_remote_code=config.trust_remote_code
            )
        forget_pad_token(settings)
        model, info = from_pretrained(
            kind,
            name,
            config=settings,
            cache_dir=config.cache_dir,
            trust_remote_code=config.trust_remote_code,
            dtype=dtype,
            **own,
        )
    except LOAD_ERRORS as error:
        if is_adapter(name, config.cache_dir):
            raise adapter_error(name) from None
        raise load_error(name, error, config) from None
    if getattr(model, "peft_config", None):
        raise adapter_error(name)
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    missing -= set_head(model, missing, head or {})
    for adapter in adapters_of(config):
        try:
            saved = load_peft_weights(adapter, device="cpu")
            missing = {key for key in missing if not any(k.endswith(f".{key}") for k in saved)}
            model = PeftModel.from_pretrained(model, adapter)
        except LOAD_ERRORS as error:
            raise UserError(
                f"reward_model_adapters: {adapter} cannot be loaded on {name} "
                f"({first_line(error)}); name adapters that were trained on it"
            ) from None
        check_adapter_weights(model, adapter, "default", "reward_model_adapters")
        if bits is None:  # merging into 4 or 8 bits would lose precision
            model = model.merge_and_unload()
    if missing:
        raise UserError(
            f"reward_model: {name} has no weights for {min(missing)}; name a finished reward "
            "model: a classifier, or a folder of a causal LM with value_head.safetensors"
        )
    return model.requires_grad_(False).eval(), set(info["unexpected_keys"])


@torch.no_grad()
def set_head(model: nn.Module, missing: set[str], head: Mapping[str, Tensor]) -> set[str]:
    """Copy a head that the files have under another name; the names of the weights that it gave.

    OpenRLHF's value_head is the classifier's score, for one.
    """
    parameters = dict(model.named_parameters())
    place = find_head({key: tuple(parameters[key].shape) for key in missing & parameters.keys()})
    weight = next((x for key, x in head.items() if key.endswith(".weight")), None)
    if place is None or weight is None:
        return set()
    given = parameters[place.weight]
    if given.shape != weight.shape:
        return set()
    given.copy_(weight)
    return {place.weight}


def quantisation(bits: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` for weights in 4 or 8 bits, which are made on `device`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"reward_model_quantization_bit: {bits} needs bitsandbytes, which is not installed; "
            f"run: {packages.install('quantization')}, or leave it out"
        )
    make_quantization: Any = BitsAndBytesConfig  # its constructor has no annotations
    config = make_quantization(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"device_map": {"": device}, "quantization_config": config}


def place_on_device(
    model: Placed, config: Config, device: torch.device, whole: nn.Module
) -> Placed:
    """Move the model to the device, or stream it; a quantised model is on the device already.

    `whole` is the model with its head, which knows the text model's layers.
    """
    if config.reward_model_quantization_bit is not None:
        return model
    streamed, folder = config.stream_frozen, config.offload_dir
    layers = list(find_layers(text_model(whole))) if streamed else None
    placed = place_frozen(model, device, streamed=streamed, layers=layers, offload_dir=folder)
    return cast(Placed, placed)


def load_own_tokenizer(name: str, config: Config) -> Any:
    """The reward model's own tokenizer, from its folder or hub name."""
    try:
        return AutoTokenizer.from_pretrained(
            name, cache_dir=config.cache_dir, trust_remote_code=config.trust_remote_code
        )
    except LOAD_ERRORS as error:
        raise UserError(
            f"reward_model: the tokenizer of {name} cannot be loaded ({first_line(error)}); put it "
            "beside the weights"
        ) from None
