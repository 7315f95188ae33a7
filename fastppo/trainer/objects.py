"""Models, adapters and rewards as objects, folders or names: the keys that they stand for."""

from __future__ import annotations

import inspect
import keyword
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from fastppo.config.below import ADAPTER
from fastppo.config.file import read_json
from fastppo.config.rewards import HEAD_FILES, check_function_name
from fastppo.config.weights import BIN, SAFETENSORS
from fastppo.errors import UserError, note
from fastppo.models.load import causal_lm
from fastppo.rewards.function import check_arguments, parameters_of

SOURCE = "PPOTrainer"
# Settings of a LoraConfig that have no key -> the values that ask for nothing.
WITHOUT_KEY: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "exclude_modules": (None,),
    "init_lora_weights": (True,),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "lora_bias": (False,),
    "use_qalora": (False,),
}


def name_of(model: Any) -> str:
    """The folder or hub name that a model was loaded from, or its class."""
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def is_wrapper(model: Any) -> bool:
    """Whether a model is TRL's AutoModelForCausalLMWithValueHead."""
    return hasattr(model, "pretrained_model") and hasattr(model, "v_head")


def policy_keys(model: Any, peft_config: Any, args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys for the policy, and what `Objects` holds of it."""
    if model is None:
        model = args.sft_model_path
    if model is None:
        raise UserError(f"{SOURCE}: model: is missing; give a model, its folder or its hub name")
    keys: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    if is_wrapper(model):
        objects["value_head"] = model.v_head.summary
        keys["critic"] = "shared"
        model = model.pretrained_model
    if isinstance(model, str | Path):
        keys |= named_policy(str(model))
    elif isinstance(model, PeftModel):
        if peft_config is not None:  # as in TRL
            model = model.merge_and_unload()
        else:
            keys |= adapter_keys(model, args)
        keys["model_name_or_path"] = name_of(causal_lm(model))
        objects["model"] = model
    elif isinstance(model, PreTrainedModel):
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            raise UserError(
                f"{SOURCE}: model: has adapters in it already, of PEFT or of an earlier trainer; "
                "load it again, or give the PeftModel"
            )
        keys["model_name_or_path"] = name_of(model)
        objects["model"] = model
    else:
        raise UserError(
            f"{SOURCE}: model: is a {type(model).__name__}; give a causal language model of "
            "transformers or PEFT, its folder or its hub name"
        )
    if "model" in objects:
        keys |= quantised_keys(causal_lm(objects["model"]))
    if peft_config is not None:
        own = objects["model"].config if "model" in objects else None
        keys |= lora_keys(peft_config, own or hub_config(keys["model_name_or_path"]))
    adapters = peft_config is not None or isinstance(objects.get("model"), PeftModel)
    lora = adapters or "adapter_name_or_path" in keys
    keys["finetuning_type"] = "lora" if lora else "full"
    return keys, objects


def named_policy(name: str) -> dict[str, Any]:
    """Keys for a policy by its name; the folder of an adapter names its base."""
    file = Path(name) / ADAPTER
    if not file.is_file():
        return {"model_name_or_path": name}
    base = read_json(file, f"{SOURCE}: model").get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{SOURCE}: model: the adapter in {name} names no base; load it with PeftModel and "
            "give that"
        )
    return {"model_name_or_path": str(base), "adapter_name_or_path": name}


def hub_config(name: str) -> Any:
    """The config.json of a model by its name."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0][:200]
        raise UserError(
            f"{SOURCE}: {name} cannot be loaded ({first}); check the folder or the hub name"
        ) from None


def adapter_keys(model: PeftModel, args: Any) -> dict[str, Any]:
    """Keys for a PeftModel, whose adapter `default` goes on training."""
    wanted = args.model_adapter_name or "default"
    config = model.peft_config.get("default")
    if wanted != "default" or config is None:
        raise UserError(
            f"{SOURCE}: model: has the adapters {', '.join(model.peft_config)}, and the one that "
            "trains must be named default; load it by PeftModel.from_pretrained(base, folder)"
        )
    if args.ref_adapter_name is not None and args.ref_adapter_name not in model.peft_config:
        raise UserError(
            f"{SOURCE}: ref_adapter_name: the model has no adapter {args.ref_adapter_name}, but "
            f"{', '.join(model.peft_config)}; name one of them"
        )
    return lora_keys(config, causal_lm(model).config, strict=False)


def lora_keys(config: Any, model_config: Any, *, strict: bool = True) -> dict[str, Any]:
    """Keys for a LoraConfig.

    Args:
        config: PEFT's configuration of the adapter.
        model_config: of the base, for PEFT's own choice of target modules.
        strict: whether it describes an adapter that is to be made, all of which must have a key.

    Raises:
        UserError: a setting has no key, or it is no LoRA.
    """
    if not isinstance(config, LoraConfig):
        raise UserError(
            f"{SOURCE}: peft_config: is a {type(config).__name__}; give a peft.LoraConfig"
        )
    for name, values in WITHOUT_KEY.items():
        value = getattr(config, name, values[0])
        if strict and value not in values:
            raise UserError(
                f"{SOURCE}: peft_config: {name}: {value} is not supported; leave it out, or give a "
                "PeftModel, whose adapter is trained as it is"
            )
    targets: Any = config.target_modules
    kind = model_config.get_text_config().model_type
    if targets is None:
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if targets is None:
        raise UserError(f"{SOURCE}: peft_config: target_modules: is needed for a {kind}; name them")
    if isinstance(targets, str):
        if targets != "all-linear" and not re.fullmatch(r"[\w.]+", targets):
            raise UserError(
                f"{SOURCE}: peft_config: target_modules: {targets!r} is a pattern; give a list of "
                'names, or "all-linear"'
            )
        targets = [targets]
    targets = ["all" if name == "all-linear" else name for name in sorted(targets)]
    if config.lora_dropout and strict:
        note(
            f"peft_config: lora_dropout: {config.lora_dropout} is 0 here, as in TRL: log-probs are "
            "those of the policy"
        )
    layers = config.layers_to_transform
    if strict and layers is not None:
        raise UserError(
            f"{SOURCE}: peft_config: layers_to_transform: is not supported; name the layers in "
            "target_modules"
        )
    saved = config.modules_to_save
    return {
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_target": ",".join(targets),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        **({"additional_target": ",".join(saved)} if saved else {}),
    }


def quantised_keys(base: Any) -> dict[str, Any]:
    """`quantization_bit` for a model that was loaded in few bits."""
    if not getattr(base, "is_quantized", False):
        return {}
    for bits in (4, 8):
        if getattr(base, f"is_loaded_in_{bits}bit", False):
            return {"quantization_bit": bits}
    raise UserError(
        f"{SOURCE}: model: is quantised, and not by bitsandbytes; load it with BitsAndBytesConfig"
    )


def reference_keys(model: Any, policy: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys for `ref_model`, and what `Objects` holds of it; None is the policy at the start."""
    if model is None:
        return {}, {}
    if is_wrapper(model):
        model = model.pretrained_model
    if model is policy or model is getattr(policy, "pretrained_model", None):
        raise UserError(
            f"{SOURCE}: ref_model: is the model that trains; leave it out: the reference is then "
            "the policy at the start"
        )
    if isinstance(model, str | Path):
        return {"ref_model": str(model)}, {}
    if isinstance(model, PeftModel) or not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{SOURCE}: ref_model: is a {type(model).__name__}; give a causal language model of "
            "transformers (of a PeftModel, merge_and_unload())"
        )
    return {"ref_model": name_of(model)}, {"ref_model": model}


def critic_keys(model: Any, others: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys for `value_model`, and what `Objects` holds of it; None leaves the key `critic`."""
    if model is None:
        return {}, {}
    if any(model is other for other in others):
        raise UserError(
            f"{SOURCE}: value_model: is another role's model too, and would change as it trains; "
            "give a copy of it, or leave it out"
        )
    if isinstance(model, str | Path):
        name = str(model)
        classes = getattr(hub_config(name), "architectures", None) or [""]
        if "SequenceClassification" not in classes[0]:
            return {"critic": "model", "critic_model": name}, {}
        load: Any = AutoModelForSequenceClassification.from_pretrained
        model = load(name, num_labels=1)
    head: Any = None
    if is_wrapper(model):
        head, model = model.v_head.summary, model.pretrained_model
    elif not hasattr(model, "lm_head"):
        head = score_of(model, "value_model")
    if isinstance(model, PeftModel) or not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{SOURCE}: value_model: is a {type(model).__name__}; give a sequence classifier of "
            "one label, or a causal language model (of a PeftModel, merge_and_unload())"
        )
    keys = {
        "critic": "model",
        "critic_model": name_of(model),
        "critic_finetuning_type": "full",  # as in TRL, whose peft_config is the policy's alone
    }
    return keys, {"critic_model": model, "value_head": head}


def score_of(model: Any, argument: str) -> nn.Linear:
    """The linear layer that computes a classifier's one score."""
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or not hasattr(model, "base_model_prefix"):
        raise UserError(
            f"{SOURCE}: {argument}: {type(model).__name__} has no linear layer `score`; give a "
            "decoder's sequence classifier, or its folder by name"
        )
    if score.out_features != 1:
        raise UserError(
            f"{SOURCE}: {argument}: {name_of(model)} has {score.out_features} labels, and a score "
            "is one number; load it with num_labels=1"
        )
    return score


def reward_keys(
    reward_funcs: Any, reward_model: Any, args: Any, conversational: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys for all rewards, and what `Objects` holds of them: name -> what scores."""
    funcs = as_list(reward_funcs)
    models = as_list(reward_model)
    if not funcs and not models:
        models = as_list(args.reward_model_path)
    if not funcs and not models:
        raise UserError(
            f"{SOURCE}: reward_funcs: there is no reward; give functions, or a reward_model"
        )
    targets, kinds, given = list[str](), list[str](), dict[str, Any]()
    value: Any
    for argument, reward in [
        *(("reward_funcs", r) for r in funcs),
        *(("reward_model", r) for r in models),
    ]:
        if isinstance(reward, str | Path):
            target, kind = str(reward), kind_of_name(str(reward))
        elif is_wrapper(reward):
            target, kind = name_of(reward.pretrained_model), "full"
            value = (reward.pretrained_model, reward.v_head.summary)
        elif isinstance(reward, nn.Module):
            target, kind = name_of(reward), "full"
            value = (reward, score_of(reward, argument))
        elif callable(reward):
            target, kind = function_name(reward), "function"
            value = TrlFunction(reward, target, conversational)
        else:
            raise UserError(
                f"{SOURCE}: {argument}: is a {type(reward).__name__}; give a function, a model, a "
                "folder or a name"
            )
        if not isinstance(reward, str | Path):
            target = unique(target.replace(",", "_"), given)
            given[target] = value
        targets.append(target)
        kinds.append(kind)
    keys = {"reward_model": ",".join(targets), "reward_model_type": ",".join(kinds)}
    return keys, {"rewards": given}


def as_list(value: Any) -> list[Any]:
    """None, one value or several as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def unique(name: str, taken: Any) -> str:
    """The name, with a number if it is taken already."""
    number, found = 2, name
    while found in taken:
        found = f"{name}_{number}"
        number += 1
    return found


def kind_of_name(name: str) -> str:
    """The `reward_model_type` of a reward that is named: by what the name leads to."""
    if name.startswith(("http://", "https://")):
        return "api"
    folder = Path(name)
    if (folder / ADAPTER).is_file():
        heads = (*HEAD_FILES, SAFETENSORS, BIN)
        return "lora" if any((folder / head).is_file() for head in heads) else "full"
    return "function" if ":" in name and not folder.exists() else "full"


def function_name(function: Callable[..., Any]) -> str:
    """`module:function` if that leads to the function, else a name for messages and metrics."""
    module = getattr(function, "__module__", None) or "reward_funcs"
    name = getattr(function, "__name__", None) or type(function).__name__
    found = f"{module}:{name}"
    try:
        check_function_name(found, "reward_funcs")
        if getattr(sys.modules.get(module), name, None) is function:
            return found
    except ValueError:
        pass
    bare = re.sub(r"\W", "", name)
    named = bare.isidentifier() and not keyword.iskeyword(bare)  # a lambda is not
    return f"reward_funcs:{bare if named else 'function'}"


class TrlFunction:
    """A reward function that is called as TRL's GRPOTrainer calls it.

    With conversational prompts it gets messages: `prompts` are lists of them, and each completion
    is a list with one message of the assistant. It also gets `trainer_state`, if it takes that.
    """

    def __init__(self, function: Callable[..., Any], name: str, conversational: bool) -> None:
        if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
            raise UserError(f"{SOURCE}: reward_funcs: {name} is async; give a plain function")
        self.function, self.conversational = function, conversational
        self.key = f"reward_funcs: {name.partition(':')[2]}"
        self.trainer_state: Any = None

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> Any:
        messages = columns.pop("prompt", None)
        if self.conversational:
            prompts = messages
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        given = {
            **columns,
            "prompts": prompts,
            "completions": completions,
            "trainer_state": self.trainer_state,
        }
        check_arguments(self.function, self.key, set(given))
        parameters = parameters_of(self.function)
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return self.function(**{k: v for k, v in given.items() if takes_all or k in parameters})
