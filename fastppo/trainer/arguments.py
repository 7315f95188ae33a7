"""PPOConfig: TrainingArguments with the keys of stage ppo, and TRL's names of them."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from transformers import TrainingArguments

from fastppo.config import Config
from fastppo.config.elsewhere import IGNORED
from fastppo.config.elsewhere import REFUSED as NOT_SUPPORTED
from fastppo.config.schema import INTERNAL, STAGE_KEYS
from fastppo.errors import UserError, one_line
from fastppo.run.launch import check_one_process
from fastppo.trainer.names import NAMES, given_names, translate

Class = Literal["mapped", "harmless", "refused"]
# Keys that an argument of PPOTrainer gives -> that argument.
ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(
        (
            "adapter_name_or_path",
            "create_new_adapter",
            "model_gguf_file",
            "model_name_or_path",
            "model_revision",
            "trust_remote_code",
        ),
        "model",
    ),
    **dict.fromkeys(
        (
            "additional_target",
            "lora_alpha",
            "lora_layers",
            "lora_rank",
            "lora_target",
            "use_dora",
            "use_rslora",
        ),
        "peft_config",
    ),
    **dict.fromkeys(
        ("dataset", "interleave_probs", "max_samples", "mix_strategy"),
        "train_dataset",
    ),
    "critic_model": "value_model",
    "eval_dataset": "eval_dataset",
    "ref_model": "ref_model",
    "ref_model_adapters": "ref_model",
    "ref_model_quantization_bit": "ref_model",
    "reward_model": "reward_model",
    "reward_model_type": "reward_model",
    "stage": "PPOTrainer",
    "early_stopping_steps": "callbacks",
}
# Fields of TrainingArguments whose class the tables of keys do not tell, and why.
HERE: dict[str, tuple[Class, str]] = {
    "activation_checkpointing": ("mapped", "activation_offloading"),
    "gradient_checkpointing": ("mapped", "activation_offloading"),
    "do_train": ("harmless", "call train()"),
    "do_eval": ("harmless", "call evaluate()"),
    "do_predict": ("harmless", "call generate_completions()"),
    "resume_from_checkpoint": ("harmless", "call train(resume_from_checkpoint=...)"),
    "save_only_model": ("harmless", "checkpoints of PPO always have what a resumed run needs"),
}
INHERITED = {field.name: field for field in dataclasses.fields(TrainingArguments)}
# Defaults that differ from those of TrainingArguments.
DEFAULTS: dict[str, Any] = {
    "logging_steps": 1,  # each PPO step, which takes long
    "eval_steps": None,
    "optim": "adamw_torch",
    "disable_tqdm": None,
    "gradient_checkpointing": None,  # as the memory plan decides
    "report_to": "none",
    "hub_strategy": "end",
    "project": None,
}
EVAL_STEPS = 500  # where neither eval_steps nor logging_steps is given
# Values of TrainingArguments' fields that ask for nothing.
NOTHING: dict[str, Any] = {"optim": "adamw_torch", "project": "huggingface"}


def class_of(name: str) -> Class | None:
    """What becomes of a field of TrainingArguments; None for one that is unknown here."""
    if name in HERE:
        return HERE[name][0]
    if name in Config.model_fields:
        return "mapped"
    if name in IGNORED:
        return "harmless"
    return "refused" if name in NOT_SUPPORTED else None


# The keys of stage ppo that are fields of PPOConfig under their own names.
OWN: dict[str, Any] = {
    name: field
    for name, field in Config.model_fields.items()
    if name not in {*INHERITED, *ELSEWHERE, *INTERNAL, *STAGE_KEYS["rm"]}
}


# Keys that PPOTrainer chooses by its arguments unless they are given.
BY_ARGUMENTS = ("critic", "critic_finetuning_type", "finetuning_type", "metrics_dir")


def plain(annotation: Any) -> Any:
    """The type of a key as argparse takes it: without ranges, and one type or None."""
    if get_origin(annotation) is Annotated:
        return plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = {plain(kind) for kind in get_args(annotation)} - {type(None)}
        return (kinds.pop() if len(kinds) == 1 else str) | None
    if get_origin(annotation) is tuple:
        return list[float]
    return dict if get_origin(annotation) is dict else annotation


def has_none(name: str) -> bool:
    """Whether None is a value of the key that is not its default."""
    field = Config.model_fields[name]
    optional = type(None) in get_args(field.annotation)
    return optional and field.default is not None


def fields() -> list[tuple[str, Any, Any]]:
    """The fields of PPOConfig: name, type and dataclass field. None is: not given."""
    made = []
    for name, default in DEFAULTS.items():
        if name in INHERITED:
            old = INHERITED[name]
            made.append((name, old.type, dataclasses.field(default=default, metadata=old.metadata)))
    for name, field in OWN.items():
        default = field.default if has_none(name) else None
        help_text = (field.description or "").replace("%", "%%")
        kind = plain(field.annotation)
        kind = kind if default is not None or type(None) in get_args(kind) else kind | None
        made.append((name, kind, dataclasses.field(default=default, metadata={"help": help_text})))
    for name, entry in NAMES.items():
        text = f"TRL's name ({entry.versions}): {entry.here}"
        found = dataclasses.field(default=None, metadata={"help": text})
        made.append((name, entry.kind | None, found))
    return made


class _PPOArguments(TrainingArguments):
    """The methods of PPOConfig, whose fields are made from tables."""

    def __post_init__(self) -> None:
        # TrainingArguments would join the other processes of a launcher.
        check_one_process("PPOTrainer", "output_dir")
        raw = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own = {**inherited_keys(raw), **own_keys(raw)}
        self._keys, lines = translate(given_names(raw, NAMES), own)
        for line in lines:
            warnings.warn(one_line(f"PPOConfig: {line}"), stacklevel=3)
        if self.project is None and "project" in INHERITED:
            self.project = INHERITED["project"].default
        if "activation_checkpointing" in INHERITED and self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing  # its name in 5.23
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name in ("activation_checkpointing", "gradient_checkpointing"):
            if name in raw:  # it makes None False, which a copy would take for asked
                setattr(self, name, raw[name])
        if raw["eval_steps"] is None and raw["logging_steps"] == DEFAULTS["logging_steps"]:
            self.eval_steps = EVAL_STEPS  # and not each step, as TrainingArguments makes it
        if raw["load_best_model_at_end"] and raw["metric_for_best_model"] is None:
            # TrainingArguments takes the loss, which no evaluation of PPO has.
            self.metric_for_best_model = "judge" if raw["eval_judge"] is not None else "reward"
            self.greater_is_better = raw["greater_is_better"] is not False
        self.world_size = 1  # type: ignore[misc]  # a field here
        for name, field in OWN.items():
            if name not in BY_ARGUMENTS:
                setattr(self, name, self._keys.get(name, field.default))

    def keys(self) -> dict[str, Any]:
        """The settings that differ from the defaults, by the names of docs/config.md."""
        return {
            name: value
            for name, value in self._keys.items()
            if name in BY_ARGUMENTS
            or name not in Config.model_fields
            or value != Config.model_fields[name].default
        }


def inherited_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that fields of TrainingArguments ask for; those that do nothing are kept, too.

    Raises:
        UserError: a field that would change a run and is not supported, by its name.
    """
    keys: dict[str, Any] = {}
    for name in INHERITED:
        value, kind = setting(raw[name]), class_of(name)
        default = setting(DEFAULTS.get(name, INHERITED[name].default))
        factory: Any = INHERITED[name].default_factory
        if factory is not dataclasses.MISSING:
            default = setting(factory())
        if value == default and not (kind == "mapped" and name in Config.model_fields):
            continue
        if kind is None:
            raise UserError(
                f"PPOConfig: {name}: is new in transformers and not known here; leave it out"
            )
        if kind == "refused" and value and value not in NOT_SUPPORTED[name][0]:
            raise UserError(f"PPOConfig: {name}: not supported; {NOT_SUPPORTED[name][1]}")
        if name in HERE or kind == "refused" or (name in NOTHING and value == NOTHING[name]):
            continue
        if kind == "harmless":
            if value and isinstance(value, str | bool | int | float | dict):
                keys[name] = value  # which is said to do nothing
        elif name == "max_grad_norm" and value is None:  # as TRL 0.9.6 writes it
            keys[name] = 0.0
        elif value != Config.model_fields[name].default and value not in (None, {}):
            keys[name] = value
    if raw.get("logging_steps") == DEFAULTS["logging_steps"]:
        keys.pop("logging_steps", None)  # then eval_steps does not follow it
        if keys.get("eval_steps") == EVAL_STEPS:
            del keys["eval_steps"]
    return keys | checkpointing(raw)


def setting(value: Any) -> Any:
    """A value of TrainingArguments as YAML would have it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list):
        return ",".join(str(setting(item)) for item in value) if value else None
    return value


def checkpointing(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys for `gradient_checkpointing`, which transformers also calls activation_."""
    wanted = raw.get("activation_checkpointing")
    wanted = raw.get("gradient_checkpointing") if wanted is None else wanted
    if wanted is None:
        return {}
    asked = raw.get("activation_offloading")
    if asked is not None and wanted != asked.startswith("checkpoint"):
        raise UserError(
            f"PPOConfig: gradient_checkpointing: {wanted} disagrees with activation_offloading: "
            f"{asked}; leave one of them out"
        )
    return {} if asked is not None else {"disable_gradient_checkpointing": not wanted}


def own_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of stage ppo that are given under their own names."""
    found = {}
    for name, field in OWN.items():
        value = raw[name]
        if has_none(name):
            if value != field.default:
                found[name] = value
        elif value is not None:
            found[name] = value
    return found


def make_config_class() -> type[_PPOArguments]:
    """PPOConfig: the class with all fields."""
    text = """Settings of PPOTrainer: transformers' TrainingArguments, the keys of stage ppo under
    the names of docs/config.md, and TRL's names of them (docs/migrate-trl.md).

    A setting that would change a run and is not supported is an error; so are two names of one
    setting with different values. `None` is: not given, and then the default of docs/config.md.
    """
    namespace = {"__doc__": text, "__module__": __name__}
    made: Any = dataclasses.make_dataclass(
        "PPOConfig", fields(), bases=(_PPOArguments,), namespace=namespace
    )
    return made  # type: ignore[no-any-return]


PPOConfig = make_config_class()
