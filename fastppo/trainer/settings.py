"""The arguments of PPOTrainer checked, and read as a configuration and its records."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import DataCollatorWithPadding, TrainerCallback

from fastppo.config import Config
from fastppo.config.objects import Objects
from fastppo.config.schema import config_from_dict
from fastppo.data import Records
from fastppo.data.mixing import read_demonstrations, split_validation
from fastppo.errors import UserError
from fastppo.models.load import load_tokenizer
from fastppo.trainer.arguments import PPOConfig
from fastppo.trainer.objects import critic_keys, policy_keys, reference_keys, reward_keys
from fastppo.trainer.records import is_conversational, make_records

SOURCE = "PPOTrainer"
# Names of arguments in TRL 0.9.6 to 0.13 -> today's.
FORMER = {
    "config": "args",
    "dataset": "train_dataset",
    "policy": "model",
    "ref_policy": "ref_model",
    "tokenizer": "processing_class",
    "optimizer": "args.optim and args.learning_rate",
    "lr_scheduler": "args.lr_scheduler_type",
    "num_shared_layers": "",
    "training_data_collator": "",
}


def check_former(model: Any, given: dict[str, Any]) -> None:
    """Refuse arguments by the names that TRL had for them once, and unknown ones."""
    if isinstance(model, PPOConfig):
        raise UserError(
            f"{SOURCE}: model: is a PPOConfig; give arguments by name: PPOTrainer(model=..., "
            "args=...)"
        )
    for name in given:
        today = FORMER.get(name)
        if today is None:
            raise TypeError(f"{SOURCE}: unexpected argument '{name}'")
        cure = f"here that is {today}" if today else "leave it out"
        raise UserError(f"{SOURCE}: {name}: is a former name of TRL's; {cure}")


def is_occupied(folder: str | Path) -> bool:
    """Whether a folder is there and holds something."""
    return Path(folder).is_dir() and any(Path(folder).iterdir())


def check_arguments(
    args: Any, train_dataset: Any, data_collator: Any, optimizers: Any, callbacks: Any
) -> None:
    """Refuse arguments that PPOTrainer has no use for."""
    if not isinstance(args, PPOConfig):
        raise UserError(
            f"{SOURCE}: args: is a {type(args).__name__}; give a fastppo.PPOConfig, which takes "
            "the same names"
        )
    if train_dataset is None:
        raise UserError(f"{SOURCE}: train_dataset: is missing; give rows with prompt or input_ids")
    if data_collator is not None and not isinstance(data_collator, DataCollatorWithPadding):
        raise UserError(
            f"{SOURCE}: data_collator: {type(data_collator).__name__} is not used: rows are padded "
            "as each pass needs it; map the data set before, and leave it out"
        )
    if any(each is not None for each in optimizers):
        raise UserError(
            f"{SOURCE}: optimizers: are made by args.optim, learning_rate, critic_learning_rate "
            "and lr_scheduler_type, as they also train the critic; leave it out"
        )
    for callback in callbacks or ():
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise UserError(
                f"{SOURCE}: callbacks: {kind.__name__} is no transformers.TrainerCallback; make it "
                "a subclass"
            )


def make_config(
    args: Any,
    *,
    model: Any,
    reward_funcs: Any,
    reward_model: Any,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    peft_config: Any,
    value_model: Any,
    ref_model: Any,
) -> Config:
    """The configuration of the run: keys of `args`, and what the other arguments stand for."""
    policy, given = policy_keys(model, peft_config, args)
    reference, given_reference = reference_keys(ref_model, model)
    critic, given_critic = critic_keys(value_model, (model, ref_model, reward_model))
    conversational = is_conversational(train_dataset)
    rewards, given_rewards = reward_keys(reward_funcs, reward_model, args, conversational)
    own = args.keys()
    for name in ("finetuning_type", "critic", "critic_finetuning_type"):
        policy.update({name: own[name]} if name in own and name in policy else {})
    objects: dict[str, Any] = {**given, **given_reference, **given_critic, **given_rewards}
    objects["ref_adapter"] = args.ref_adapter_name
    objects["tokenizer"] = None if processing_class is None else tokenizer_of(processing_class)
    keys: dict[str, Any] = {
        "stage": "ppo",
        "do_train": True,
        "dataset": "train_dataset",
        **({} if eval_dataset is None else {"eval_dataset": "eval_dataset"}),
        "output_dir": str(args.output_dir),
        "metrics_dir": str(Path(args.output_dir) / "ppo_metrics"),
        **policy,
        **reference,
        **critic,
        **rewards,
        **own,
    }
    if value_model is not None and keys["critic"] != "model":
        raise UserError(
            f"{SOURCE}: value_model: is a model of its own, and args.critic is {keys['critic']}; "
            "leave one of them out"
        )
    if value_model is not None and keys.get("advantage", "gae") != "gae":
        raise UserError(
            f"{SOURCE}: value_model: advantage: {keys['advantage']} has no critic; leave it out"
        )
    return config_from_dict(keys, SOURCE, Objects(**objects))


def tokenizer_of(processing_class: Any) -> Any:
    """A copy of the tokenizer: the template sets its padding, EOS and chat template."""
    if not hasattr(processing_class, "encode"):
        raise UserError(
            f"{SOURCE}: processing_class: is a {type(processing_class).__name__}; give a tokenizer"
        )
    return copy.deepcopy(processing_class)


def make_all_records(config: Config, train_dataset: Any, eval_dataset: Any) -> Records:
    """The records of all data sets; `val_size` is split off if there is no `eval_dataset`."""
    tokenizer = load_tokenizer(config)
    train = make_records(train_dataset, "train_dataset", tokenizer, config.template)
    held_out = []
    if eval_dataset is not None:
        held_out = make_records(eval_dataset, "eval_dataset", tokenizer, config.template)
    elif config.val_size:
        train, held_out = split_validation(train, config)
    return Records(train, held_out, read_demonstrations(config, []))
