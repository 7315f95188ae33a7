"""The configuration: all keys, with LLaMA-Factory's and TRL's names and meanings.

No torch here: `--help` and the error for a wrong key must appear at once.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from fastppo.config.best import check_best
from fastppo.config.data import DATA_LISTS, DataKeys
from fastppo.config.elsewhere import IGNORED, NOT_HERE, OLD_NAMES, REFUSED
from fastppo.config.engine import EngineKeys, check_engine, with_importance_names
from fastppo.config.file import override, parse_value, read_file
from fastppo.config.key import Keys
from fastppo.config.memory import MemoryKeys, StepKeys, check_offload, check_step
from fastppo.config.model import ModelKeys
from fastppo.config.objects import Objects
from fastppo.config.old_names import meant, with_todays_names
from fastppo.config.parallel import check_sharding
from fastppo.config.ppo import ALIASES, ELSEWHERE, AlgorithmKeys
from fastppo.config.rewards import RewardKeys, RewardSpec, reward_specs, split
from fastppo.config.rm import RMKeys
from fastppo.config.roles import ROLES_LISTS, CriticKeys, ReferenceKeys, TuningKeys, check_roles
from fastppo.config.run import RunKeys
from fastppo.config.sampling import EvaluationKeys, SamplingKeys
from fastppo.config.tracking import TRACKING_LISTS, TrackingKeys
from fastppo.config.training import TrainingKeys
from fastppo.errors import UserError


# pydantic orders keys from the last base class to the first, so RunKeys come first.
class Config(
    StepKeys,
    MemoryKeys,
    RMKeys,
    EvaluationKeys,
    AlgorithmKeys,
    TrackingKeys,
    TrainingKeys,
    ReferenceKeys,
    CriticKeys,
    EngineKeys,
    SamplingKeys,
    RewardKeys,
    DataKeys,
    TuningKeys,
    ModelKeys,
    RunKeys,
):
    """The checked configuration of one run, frozen; each key has a description."""

    source: str = Field("<python>", exclude=True)
    ignored: tuple[str, ...] = Field((), exclude=True)
    remarks: tuple[str, ...] = Field((), exclude=True)
    objects: Objects = Field(default_factory=Objects, exclude=True, repr=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a run says of its file: a line on each key that it reads in a way of its own.

        Keys that do nothing here are all named in one line, whatever their number.
        """
        if not self.ignored:
            return self.remarks
        names = ", ".join(self.ignored)
        return (*self.remarks, f"without effect here (--explain says why): {names}")

    @property
    def rewards(self) -> tuple[RewardSpec, ...]:
        """The rewards that score the policy's responses; empty in stage rm."""
        if self.stage != "ppo" or not self.reward_model:
            return ()
        return reward_specs(self.reward_model, self.reward_model_type, self.reward_weights)

    @property
    def reward_adapters(self) -> dict[str, str]:
        """Adapter name -> folder of each reward of type lora: `reward`, `reward_2`, ..."""
        folders = [spec.target for spec in self.rewards if spec.kind == "lora"]
        return {f"reward_{i}" if i > 1 else "reward": name for i, name in enumerate(folders, 1)}

    @model_validator(mode="after")
    def _belongs_together(self) -> Config:
        for name in ("do_eval", "do_predict"):
            # A PPO run that trains then evaluates on its training prompts, and says so.
            needed = name == "do_predict" or self.stage == "rm" or not self.trains
            if getattr(self, name) and needed and not (self.eval_dataset or self.val_size):
                raise ValueError(
                    f"{name}: nothing is held out; name an eval_dataset, or set val_size"
                )
        if self.stage == "ppo" and not self.reward_model:
            raise ValueError(
                "reward_model: stage ppo needs one; name the folder that stage rm wrote, or a "
                "module:function with reward_model_type: function"
            )
        kinds = [spec.kind for spec in self.rewards]
        for name in ("reward_model_adapters", "reward_model_quantization_bit"):
            if getattr(self, name) is not None and kinds.count("full") != 1:
                raise ValueError(f"{name}: {only_with_full(self, name, kinds)}")
        check_best(self)
        if self.lr_scheduler_type == "reduce_lr_on_plateau" and (
            self.stage == "ppo" or self.eval_strategy == "no"
        ):
            raise ValueError(
                "lr_scheduler_type: reduce_lr_on_plateau follows evaluations of stage rm, with "
                "eval_strategy; use cosine or linear"
            )
        for name in ("output_dir", "metrics_dir", "model_name_or_path", "dataset"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: is empty; give it a value")
        check_roles(self)
        for name in ("min_new_tokens", "min_response_length", "overlong_buffer_len"):
            if (getattr(self, name) or 0) > self.max_new_tokens:
                raise ValueError(f"{name}: is above max_new_tokens; lower it")
        if self.stage == "ppo" and self.rollout_batch_size % self.num_generations:
            raise ValueError(
                f"num_generations: {self.num_generations} does not divide the "
                f"{self.rollout_batch_size} responses of a rollout (per_device_train_batch_size x "
                "gradient_accumulation_steps x ppo_buffer_size); change one of them"
            )
        check_offload(self)
        check_sharding(self)
        check_step(self)
        check_engine(self)
        return self


def only_with_full(config: Config, name: str, kinds: Sequence[str]) -> str:
    """Why a key of a `full` reward is refused in a run without one, and the ways out."""
    count = kinds.count("full")
    there = f"there are {count}" if count else "there is none"
    why = f"is for the one reward of reward_model_type: full, and {there}; "
    adapters = config.reward_model_adapters or ""
    if list(kinds) != ["lora"] or name != "reward_model_adapters" or "," in adapters:
        return f"{why}leave it out"
    return (
        f"{why}either set reward_model_type: full, which loads {config.reward_model} with it, or "
        f"name the adapter in reward_model ({adapters}) and leave reward_model_adapters out, where "
        "it was trained on model_name_or_path"
    )


# Fields that are no keys.
INTERNAL = frozenset({"source", "ignored", "remarks", "objects"})
SLIP = 0.85  # similarity from which a name is a key that was mistyped, not another
# Keys that are comma-separated strings in LLaMA-Factory; here they may also be YAML lists.
COMMA_LISTS = (
    *DATA_LISTS,
    *TRACKING_LISTS,
    "ptx_dataset",
    "reward_model",
    "reward_model_type",
    "reward_model_adapters",
    *ROLES_LISTS,
)
# The groups, in the order of their keys.
GROUPS: list[type[Keys]] = [
    group
    for group in reversed(Config.__mro__)
    if issubclass(group, Keys) and "title" in vars(group)
]
# Keys that only one stage uses.
STAGE_KEYS = {
    stage: frozenset(
        name for group in GROUPS if group.own_stage == stage for name in group.model_fields
    )
    for stage in ("ppo", "rm")
}
# The keys that most runs set.
FIRST = [
    name
    for name, field in Config.model_fields.items()
    if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("first")
]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a file, apply overrides, check it; a UserError names the file, the key and the cure."""
    path = Path(path)
    data = read_file(path)
    for text in overrides:
        override(data, text)
    return config_from_dict(data, source=str(path))


def renamed(data: Mapping[Any, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """`data` with the names used here, and a line for each of LLaMA-Factory's former names."""
    given = {str(name): value for name, value in data.items()}
    for alias, name in ALIASES.items():
        if alias in given and name in given:
            raise UserError(f"{source}: {alias}: is TRL's name for {name}; keep one of the two")
        if alias in given:
            given[name] = given.pop(alias)
    for alias, name in OLD_NAMES.items():
        value = given.pop(alias, None)
        if value is not None and given.setdefault(name, value) != value:
            raise UserError(f"{source}: {alias}: is an older name of {name}; keep one of the two")
    given, lines = with_importance_names(given, source)
    found, former = with_todays_names(given, source)
    return found, [*lines, *former]


def config_from_dict(
    data: Mapping[Any, Any], source: str = "<python>", objects: Objects | None = None
) -> Config:
    """Make a configuration from a mapping of keys; `source` is its name in errors.

    `objects` are given in place of what keys name.
    """
    given, remarks = renamed(data, source)
    ignored = []
    for name in list(given):
        value, reason = given[name], IGNORED.get(name)
        if reason is not None:
            del given[name]
            if value is not None:
                ignored.append(name)
        elif name in REFUSED:
            harmless, cure = REFUSED[name]
            if meant(given.pop(name)) not in harmless:
                raise UserError(f"{source}: {name}: not supported; {cure}")
        elif (name, value) in ((k, v) for k, v in NOT_HERE):
            raise UserError(f"{source}: {name}: {value}: {NOT_HERE[name, value]}")
        elif name in INTERNAL or name not in Config.model_fields:
            if extra_allowed():
                remarks.append(f"'{name}' is unknown and ignored (ALLOW_EXTRA_ARGS)")
                del given[name]
                continue
            raise UserError(
                f"{source}: unknown key '{name}'; {suggest_key(name, given.get('stage'))}"
            )
        elif value is None and Config.model_fields[name].default is not None:
            # `key:` without a value, as in tutorials, means the default.
            if Config.model_fields[name].is_required():
                raise UserError(f"{source}: {name}: has no value; give it one")
            del given[name]
    given = {name: _listed(name, value) for name, value in given.items()}
    for name, value in given.items():
        if isinstance(value, str) and unwritable(value):
            raise UserError(f"{source}: {name}: {shown(value)} holds a null or half a character")
        if isinstance(value, bool) and "bool" not in str(Config.model_fields[name].annotation):
            raise UserError(f"{source}: {name}: {str(value).lower()} is wrong; {instead(name)}")
    for name in of_other_stage(given):
        ignored.append(name)
        if name == "lora_dropout":
            remarks.append(
                "'lora_dropout' acts in stage rm alone: dropout would change PPO's ratios"
            )
    try:
        return Config(
            **given,
            source=source,
            ignored=tuple(ignored),
            remarks=tuple(remarks),
            objects=objects or Objects(),
        )
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error)}") from None


def extra_allowed() -> bool:
    """Whether unknown keys are let through, by LLaMA-Factory's variable of the environment."""
    return os.environ.get("ALLOW_EXTRA_ARGS", "0").lower() in ("1", "true", "y")


def of_other_stage(given: Mapping[str, Any]) -> list[str]:
    """Keys that only the other stage uses, but that were set to another value than the default."""
    other = {"rm": "ppo", "ppo": "rm"}.get(str(given.get("stage")), "")
    return [
        name
        for name in given
        if name in STAGE_KEYS.get(other, ()) and given[name] != Config.model_fields[name].default
    ]


def _listed(name: str, value: Any) -> Any:
    """Convert a YAML list to LLaMA-Factory's comma-separated string, and other such spellings."""
    if name in COMMA_LISTS and isinstance(value, list):
        return ",".join(str(item) for item in value)
    if name == "reward_weights" and not isinstance(value, bool):
        if isinstance(value, str):
            return split(value)
        return [value] if isinstance(value, int | float) else value
    if name == "lr_scheduler_kwargs" and isinstance(value, str):
        return parse_value(value)
    # YAML 1.1 reads `eval_strategy: no` as false.
    return "no" if name.endswith("_strategy") and value is False else value


def instead(name: str) -> str:
    """What a key takes in place of true or false."""
    annotation = str(Config.model_fields[name].annotation)
    words = re.findall(r"Literal\[([^\]]*)\]", annotation)
    if words and "'" in words[0]:
        wanted = f"one of {words[0].replace(chr(39), '')}"
    elif words:
        wanted = f"one of {words[0]}, or null"
    else:
        number = "int" in annotation or "float" in annotation
        wanted = "a number" if number else "a mapping" if "dict" in annotation else "text"
    return f"it should be {wanted}"


def suggest_key(name: str, stage: Any = None) -> str:
    """The cure in the error for an unknown key; a key without effect in `stage` is never named."""
    if name in ELSEWHERE:
        return f"here that is {ELSEWHERE[name]}"
    other = STAGE_KEYS.get({"rm": "ppo", "ppo": "rm"}.get(str(stage), ""), frozenset())
    idle = [*IGNORED, *REFUSED, *other]
    near = difflib.get_close_matches(name, [*set(Config.model_fields) - INTERNAL, *idle], n=1)
    # As near as a slip of the hand: what was meant is a key that does nothing.
    if near and near[0] in idle and difflib.SequenceMatcher(None, near[0], name).ratio() >= SLIP:
        where = f"to stage {stage}" if near[0] in other else "here"
        return f"it is close to '{near[0]}', which does nothing {where}; take it out"
    return suggest(name, sorted(set(Config.model_fields) - INTERNAL - other))


LISTED = "docs/config.md lists the keys; take it out, or set ALLOW_EXTRA_ARGS=1 to ignore it"


def suggest(name: str, known: Sequence[str], otherwise: str = LISTED) -> str:
    """The name in `known` that is nearest to `name`; `otherwise` if none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return otherwise


def explain(error: ValidationError) -> str:
    """The first error in a run's configuration, in one line."""
    return explain_in(Config, error)


def explain_in(model: type[BaseModel], error: ValidationError) -> str:
    """The first error, in one line: what was expected, what was given, and the cure."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    name = str(first["loc"][0]) if first["loc"] else "configuration"
    if first["type"] == "missing":
        meaning = model.model_fields[name].description or ""
        return f"{name}: is missing; add it: {meaning[0].lower()}{meaning[1:]}"
    came = first["input"]
    if first["type"] == "literal_error":
        expected = first["ctx"]["expected"].replace("'", "")
        words = expected.replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches(str(came), words, n=1, cutoff=0.6)
        return f"{name}: {shown(came)} is none of {expected}" + (
            f"; did you mean {near[0]}?" if near else "; choose one of them"
        )
    wanted = first["msg"].removeprefix("Input should be ")
    wanted = wanted.split(", unable")[0]
    return f"{name}: {shown(came)} is wrong; it should be {wanted}"


def unwritable(text: str) -> bool:
    """Whether a text has a null character or half a surrogate pair, which no path may have."""
    return "\0" in text or text.encode("utf-8", "ignore").decode() != text


def shown(value: Any) -> str:
    """A value as Python writes it, shortened to fit on a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a list in itself
        return f"this {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
