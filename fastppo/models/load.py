"""Loading causal language models and tokenizers, and finding a model's trunk and output head."""

from __future__ import annotations

import importlib.util
import re
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from fastppo.config.memory import offload_mode
from fastppo.config.model import own_dtype, run_dtype
from fastppo.config.published import check_last_position
from fastppo.config.weights import few, find_head
from fastppo.errors import UserError, note
from fastppo.models.quantised import quantization_config, use_training_kernels
from fastppo.models.weights import (
    forget_pad_token,
    from_pretrained,
    is_adapter,
    left_out_line,
    vocabulary_size,
)
from fastppo.offload.activations import ActivationOffload, find_layers, wrap

if TYPE_CHECKING:
    from fastppo.config import Config


# The exceptions of transformers, PEFT, safetensors and torch for missing or broken files.
LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    ImportError,
    SafetensorError,
    UnpicklingError,
)


def first_line(error: Exception) -> str:
    """The first line of a library's error message, or a clearer reason if the cause is known."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error).strip())
    if "Weights only load failed" in text:
        return "it is no file of tensors alone, and nothing else in it is opened"
    if "custom code" in text:
        return "it brings code of its own, which runs only with trust_remote_code: true"
    if isinstance(error, KeyError):
        return f"unknown {text}"
    first, _, rest = (text or type(error).__name__).partition("\n")
    return (f"{first} {' '.join(rest.split())}" if first.rstrip().endswith(":") else first)[:200]


def advice_on_hub(name: str, text: str) -> str:
    """What to do about a model that does not load, by the message of the hub's client."""
    words = "" if Path(name).is_dir() else text.lower()
    if "gated" in words or "private repo" in words:
        return (
            "check the name; if it is gated or private, accept its terms on its page and set "
            "HF_TOKEN (or hf_hub_token)"
        )
    if any(x in words for x in ("couldn't connect", "can't load", "offline", "outgoing traffic")):
        return (
            f"if it is on the hub, `hf download {name}` fetches it where there is a network "
            "(HF_ENDPOINT names a mirror); a folder on this machine is named by its path"
        )
    return "check the folder or the hub name"


def load_tokenizer(config: Config, name: str | None = None) -> Any:
    """The tokenizer of `model_name_or_path`, or of the model `name`."""
    if name is None and config.objects.tokenizer is not None:
        return config.objects.tokenizer
    named = name or config.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(named, **_hub_settings(config, name))
    except Exception as error:  # the tokenizers package raises Exception itself
        raise UserError(
            f"{config.source}: {named} has no tokenizer that can be loaded ({first_line(error)}); "
            f"{advice_on_hub(named, str(error))}"
        ) from None


def load_base(
    config: Config,
    device: torch.device,
    name: str | None = None,
    bits: int | None = None,
    *,
    key: str | None = None,
    on_host: bool = False,
) -> PreTrainedModel:
    """Load `model_name_or_path`, or the model `name`: frozen, without dropout, in the run's dtype.

    `bits` quantises its linear layers to 4 or 8 bits, the output head excepted. It is moved to
    `device`; with `on_host` it stays in host memory, unless it is quantised. `key` is the setting
    that gave `name`, for errors.

    Raises:
        UserError: the model cannot be loaded, or its files lack some of its weights.
    """
    disable_progress_bar()
    dtype = compute_dtype(config, device)
    settings: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention_implementation(config.flash_attn, device, dtype),
        **_hub_settings(config, name),
    }
    if bits is not None:
        # bitsandbytes quantises weights on the device; they cannot be moved afterwards.
        settings |= {
            "quantization_config": quantization_config(config, bits, dtype),
            "device_map": {"": device},
        }
    own = load_config(config, name)
    key = key or "model_name_or_path"
    name = name or config.model_name_or_path
    check_last_position(config, key, name, own.to_dict())
    if forget_pad_token(own):
        settings["config"] = own
    try:
        base, info = from_pretrained(AutoModelForCausalLM, name, **settings)
    except LOAD_ERRORS as error:
        # There is no such model, it lacks this kind of attention, or a package is missing.
        raise load_error(config, name, error) from None
    if getattr(base, "peft_config", None):
        # transformers has loaded the base that the adapter names, and has not merged the two.
        raise adapter_error(config, name)
    line = check_weights(config.source, name, base, info)
    if line is not None:
        note(line)
    if getattr(base.get_output_embeddings(), "weight", None) is None:
        raise UserError(
            f"{config.source}: {name} ({type(base).__name__}) does not say which of its layers is "
            "the output head, so it cannot be trained here; name a model of another family"
        )
    base.requires_grad_(False)
    disable_dropout(base)
    if bits is not None:
        use_training_kernels(base)
    return base if on_host or bits is not None else base.to(device)


def check_weights(source: str, name: str, base: nn.Module, info: dict[str, Any]) -> str | None:
    """Refuse a model whose files lack some of its weights; a line on those that it did not take.

    `source` is the file that named it, for the error, and `info` the loading info of transformers.
    """
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith("v_head.")]
    # What is missing or of another shape, transformers fills with random numbers.
    wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    head = find_head(dict.fromkeys(unexpected, (1, 1)))
    if wrong and head is not None:
        raise UserError(
            f"{source}: {name} is a classifier ({head.weight}) without {few(wrong)}, which "
            "a language model needs; name the model that it was made from"
        )
    if wrong:
        raise UserError(
            f"{source}: {name} has no {min(wrong)} of the shape that its config.json asks "
            "for; its files are not one model's: fetch or save it again"
        )
    return left_out_line(name, unexpected, type(base).__name__)


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of all models of the run and of their matrix products."""
    own, on_gpu = "float32", device.type == "cuda"
    if on_gpu and not (config.bf16 or config.fp16):
        own = own_dtype(load_config(config).to_dict())
    named = run_dtype(bf16=config.bf16, fp16=config.fp16, own=own, on_gpu=on_gpu)
    return cast(torch.dtype, getattr(torch, named))


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """The dtype to which the run autocasts: its own, or None if that is float32."""
    dtype = compute_dtype(config, device)
    return None if dtype == torch.float32 else dtype


def load_config(config: Config, name: str | None = None) -> PretrainedConfig:
    """The config.json of `model_name_or_path`, or of the model `name`."""
    if name is None and config.objects.model is not None:
        own: PretrainedConfig = causal_lm(config.objects.model).config
        return own
    named = name or config.model_name_or_path
    try:
        return AutoConfig.from_pretrained(named, **_hub_settings(config, name))
    except LOAD_ERRORS as error:
        raise load_error(config, named, error) from None


def load_error(config: Config, name: str, error: Exception) -> UserError:
    """The error for a model that cannot be loaded: it is missing, broken, or lacks a package."""
    if is_adapter(name, config.cache_dir):
        return adapter_error(config, name)
    return UserError(f"{config.source}: {not_loaded(name, error, config.flash_attn)}")


def adapter_error(config: Config, name: str) -> UserError:
    """The error for an adapter where a model should be."""
    cure = "name it in adapter_name_or_path, and its base as the model"
    return UserError(f"{config.source}: {name} is an adapter; {cure}")


def not_loaded(name: str, error: Exception, flash_attn: str = "auto") -> str:
    """What kept transformers from loading `name`, and the cure for that very thing."""
    text = str(error)
    if "attention implementation" in text or "Attention 2" in text:
        kind = text.split()[0]
        return (
            f"flash_attn: {flash_attn}: {name} is a {kind}, for which transformers has no such "
            "attention; use flash_attn: disabled, or auto"
        )
    if found := re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)Config'>", text):
        return (
            f"{name} is a {found[1]}, for which transformers has no language model of text alone; "
            "name one (pictures and sound, encoders with a decoder, and encoders are not supported)"
        )
    if found := re.search(r"model type `(\w+)` but Transformers does not recognize", text):
        return (
            f"{name} is of model_type {found[1]}, which transformers {transformers.__version__} "
            "does not know; install a newer one, or mend model_type in its config.json"
        )
    cure = advice_on_hub(name, text)
    if "custom code" in text:
        cure = "set that if you trust it, or name another"
    elif isinstance(error, ImportError):
        cure = "install what it needs"
    return f"{name} cannot be loaded ({first_line(error)}); {cure}"


def _hub_settings(config: Config, name: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say where files come from.

    `name` is None for `model_name_or_path`; revision and GGUF file apply only to that model.
    """
    found = {"cache_dir": config.cache_dir, "trust_remote_code": config.trust_remote_code}
    if name is None:
        found["revision"] = config.model_revision
        if config.model_gguf_file:
            found["gguf_file"] = config.model_gguf_file
    return found


def attention_implementation(
    flash_attn: str, device: torch.device, dtype: torch.dtype
) -> str | None:
    """transformers' name for LLaMA-Factory's `flash_attn`; None leaves the choice to transformers.

    `auto` is flash-attn if it is installed and can run (on CUDA, from Ampere on, in 16 bits), else
    None.
    """
    runs = device.type == "cuda" and dtype != torch.float32 and not before_ampere(device)
    if flash_attn == "fa2" and not runs:
        if device.type != "cuda":
            raise UserError("flash_attn: fa2 needs a CUDA device and there is none; use auto")
        if before_ampere(device):
            raise UserError("flash_attn: fa2 needs a GPU of Ampere or later; use auto")
        raise UserError("flash_attn: fa2 computes in 16 bits; set bf16: true, or use auto")
    if flash_attn == "auto" and runs and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2"
    names = {"sdpa": "sdpa", "disabled": "eager", "fa2": "flash_attention_2"}
    return names.get(flash_attn)


def before_ampere(device: torch.device) -> bool:
    """Whether this GPU is older than flash-attn supports: V100, T4, RTX 20."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] < 8


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of the model to 0, so that two passes give the same log-probs.

    That includes dropout modules and the rates that attention passes to functional dropout, which
    are float attributes of many names (attention_dropout, dropout_p, attn_drop, layerdrop).
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def wrap_activations(config: Config, base: nn.Module) -> ActivationOffload:
    """Checkpoint or offload the activations of `base` as `activation_offloading` says.

    Layers below the lowest one that trains are left alone: they save no activations. The layers are
    the text model's, which beside a large vision tower are not those with the most parameters.
    """
    layers = find_layers(text_model(base))
    return wrap(base, offload_mode(config), layers=layers, offload_dir=config.offload_dir)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside a PEFT model; any other `model` is returned as it is."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast(PreTrainedModel, inner)


def trunk(model: nn.Module) -> nn.Module:
    """The causal language model without its output head: embeddings and layers."""
    base = causal_lm(model)
    return cast(nn.Module, getattr(base, base.base_model_prefix))


def text_model(model: nn.Module) -> nn.Module:
    """The part that text passes below the output head: the trunk, or the language model in it.

    Only a multimodal model has more in its trunk: towers for images or sound, which text never
    passes.
    """
    base: Any = causal_lm(model)
    if base.config.get_text_config() is base.config:
        return trunk(base)
    return cast(nn.Module, base.get_decoder())


def hidden_size(model: nn.Module) -> int:
    """Width of the last hidden state, which is what the output head takes.

    It is not always `config.hidden_size`: OPT-350m has 1024, and projects to 512 for its head.
    """
    base: Any = causal_lm(model)
    head = base.get_output_embeddings()
    if head is None:  # a classifier
        return int(base.config.get_text_config().hidden_size)
    return int(head.weight.shape[-1])


def logit_scale(model: nn.Module) -> float:
    """What logits are multiplied by behind the output head: Cohere's and Granite's models, others.

    A model that does it under a name unknown here is refused by `Roles.check_head`.
    """
    config = causal_lm(model).config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return float(scale * divisor if config.model_type == "hyperclovax" else scale / divisor)


def check_same_tokens(
    config: Config,
    key: str,
    name: str,
    model: nn.Module,
    cure: str = "name a model with the same one",
) -> None:
    """Raise UserError if a model's tokenizer is not the policy's: it would read other token ids.

    Args:
        key: the setting that names the model, for the error.
        name: its folder or hub name.
        model: the model itself.
        cure: the error's advice.
    """
    tokenizer, own = load_tokenizer(config), vocabulary_size(load_config(config))
    rows = causal_lm(model).get_input_embeddings().weight.shape[0]
    theirs = None
    if config.objects.under(key) is None:  # of a given model only the number of tokens is known
        with suppress(UserError):  # and of a folder without tokenizer
            theirs = load_tokenizer(config, name).get_vocab()
    # A token that the policy itself has no row for never comes.
    if min(len(tokenizer), own) > rows or (theirs is not None and theirs != tokenizer.get_vocab()):
        raise UserError(
            f"{key}: {name} has another tokenizer than {config.model_name_or_path}; {cure}"
        )
