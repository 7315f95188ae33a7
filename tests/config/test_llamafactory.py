"""Files of LLaMA-Factory's: each key has a meaning here, a note, or an error with a cure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastppo.config import Config, load_config
from fastppo.config.elsewhere import IGNORED, NOT_HERE, OLD_NAMES, REFUSED
from fastppo.config.file import read_file
from fastppo.config.old_names import RENAMED
from fastppo.config.parallel import FSDP_WORDS
from fastppo.config.ppo import ALIASES, ELSEWHERE
from fastppo.config.schema import COMMA_LISTS, INTERNAL, STAGE_KEYS, config_from_dict, suggest_key
from fastppo.config.tracking import TRACKERS
from fastppo.config.training import due
from fastppo.errors import UserError
from tests.config.llamafactory_page import KEYS, page
from tests.project import PPO, RM
from tests.tiers import slow_unless

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = read_file(KEYS)
FORMER = read_file(KEYS.with_name("former_keys.yaml"))
DEFAULTS = {name: value for keys in SECTIONS.values() for name, value in keys.items()}


def test_docs_llamafactory_md_is_what_the_code_says():
    assert (ROOT / "docs" / "llamafactory.md").read_text(encoding="utf-8") == page()


def test_every_key_of_llamafactory_is_known_and_in_one_table_only():
    tables = (set(Config.model_fields), *map(set, (IGNORED, REFUSED, OLD_NAMES, RENAMED)))
    for name in [*DEFAULTS, *FORMER]:
        assert sum(name in table for table in tables) == 1, name
    assert sum(map(len, tables)) == len(set().union(*tables))


def test_no_key_of_llamafactory_is_listed_twice():
    assert sum(len(keys) for keys in SECTIONS.values()) == len(DEFAULTS)


@pytest.mark.parametrize("base", [PPO, RM], ids=["ppo", "rm"])
def test_a_file_that_spells_out_every_default_loads(base):
    spelled = {name: value for name, value in DEFAULTS.items() if value != "needed"}
    config = config_from_dict({**spelled, **base, "do_train": True, "output_dir": "out"})
    noted = set(config.ignored)
    expected = {name for name in DEFAULTS if name in IGNORED and DEFAULTS[name] is not None}
    assert expected <= noted
    # What LLaMA-Factory samples with by default is the other thing that stage rm has no use for.
    assert noted - expected <= STAGE_KEYS["ppo"]


def test_a_default_of_llamafactorys_changes_nothing_but_what_the_page_lists():
    names = [name for name in DEFAULTS if name in Config.model_fields and name not in PPO]
    spelled = {name: DEFAULTS[name] for name in names if DEFAULTS[name] not in ("needed", None)}
    config = config_from_dict({**PPO, **spelled, "do_train": True}).model_dump()
    plain = config_from_dict(PPO).model_dump()
    listed = set(re.findall(r"^\| `(\w+)`", page().split("## Every key")[0], re.MULTILINE))
    assert {name for name in config if config[name] != plain[name]} <= listed


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_done_is_refused_and_its_harmless_value_is_not(name):
    harmless, cure = REFUSED[name]
    with pytest.raises(UserError, match=rf"^<python>: {name}: not supported; {re.escape(cure)}$"):
        config_from_dict({**PPO, name: "something"})
    for value in harmless:
        assert config_from_dict({**PPO, name: value}).ignored == ()


@pytest.mark.parametrize(("name", "wrong"), sorted(NOT_HERE))
def test_a_value_that_is_not_done_says_what_to_use(name, wrong):
    with pytest.raises(UserError, match=f"^<python>: {name}: {wrong}: "):
        config_from_dict({**PPO, name: wrong})


@pytest.mark.parametrize("name", slow_unless(sorted(IGNORED)[::5].__contains__, sorted(IGNORED)))
def test_a_key_without_effect_is_named(name):
    config = config_from_dict({**PPO, name: 1})
    assert config.ignored == (name,)
    assert config.notes == (f"without effect here (--explain says why): {name}",)
    assert config_from_dict({**PPO, name: None}).notes == ()


def test_no_cure_names_a_key_that_is_not_there():
    words = " ".join(cure for _, cure in REFUSED.values()) + " ".join(NOT_HERE.values())
    known = {*Config.model_fields, *REFUSED, *ELSEWHERE, *ALIASES, *FSDP_WORDS}
    options = set(str({x for f in Config.model_fields.values() for x in [f.annotation]}).split("'"))
    for word in re.findall(r"\b[a-z]+_[a-z_0-9]+\b", words):
        assert word in known | options, word


def test_older_names_mean_what_they_meant():
    config = config_from_dict({**PPO, "evaluation_strategy": "epoch", "no_cuda": True})
    assert (config.eval_strategy, config.use_cpu) == ("epoch", True)
    with pytest.raises(UserError, match="evaluation_strategy: is an older name of eval_strategy"):
        config_from_dict({**PPO, "evaluation_strategy": "epoch", "eval_strategy": "no"})


@pytest.mark.parametrize("name", sorted(FORMER))
def test_a_default_of_2023_is_no_error_but_for_what_cutoff_len_took_over(name):
    default = FORMER[name][0]
    keys = {k: v for k, v in PPO.items() if k != RENAMED.get(name)} | {name: default}
    if name in ("max_source_length", "max_target_length"):
        with pytest.raises(UserError, match="here that is cutoff_len"):
            config_from_dict(keys)
    else:
        config_from_dict(keys)


def test_a_file_of_2023_starts_from_its_sft_adapter_and_trains_another():
    """The file of an issue of then: the adapter was lost, and rank 8 trained on the bare base."""
    old = {"checkpoint_dir": "sft", "resume_lora_training": False, "neft_alpha": 0}
    config = config_from_dict({**PPO, **old, "flash_attn": False, "shift_attn": False})
    assert (config.adapter_name_or_path, config.create_new_adapter) == ("sft", True)
    assert config.flash_attn == "sdpa"
    assert config.notes == (
        "'checkpoint_dir' is LLaMA-Factory's former name, and read as adapter_name_or_path",
        "'resume_lora_training' is LLaMA-Factory's former name, and read as create_new_adapter: "
        "true",
        "'flash_attn: false' is LLaMA-Factory's former value, and read as sdpa",
    )
    assert not config_from_dict({**PPO, "resume_lora_training": "true"}).create_new_adapter
    with pytest.raises(UserError, match="reward_model_checkpoint: is a former name of reward_mod"):
        config_from_dict({**PPO, "reward_model_checkpoint": "a", "reward_model_adapters": "b"})


def test_checkpoint_dir_of_a_whole_model_is_not_taken_for_an_adapter():
    with pytest.raises(UserError, match="which is model_name_or_path today; put it there"):
        config_from_dict({**PPO, "finetuning_type": "full", "checkpoint_dir": "sft"})


def test_a_quoted_value_is_the_value_meant():
    keys = {"fp16": "false", "deepspeed": "null", "num_beams": "1", "bf16": "False"}
    assert config_from_dict({**PPO, **keys}).notes == ()
    assert config_from_dict({**PPO, "fp16": "true"}).fp16
    with pytest.raises(UserError, match="fp8: not supported"):
        config_from_dict({**PPO, "fp8": "true"})
    assert config_from_dict({**PPO, "flash_attn": "true"}).flash_attn == "fa2"


NAMES = [*Config.model_fields, *IGNORED, *REFUSED, *RENAMED]


def misspelt(key: str) -> tuple[str, str, str]:
    """A key without its last letter, without its last four, and with a word before it."""
    return key[:-1], key[:-4], f"my_{key}"


def check_suggestions(stage: str, forms: set[str]) -> None:
    """No suggestion for any of these misspelt keys is a key without effect in `stage`."""
    other = STAGE_KEYS["ppo" if stage == "rm" else "rm"]
    for name in forms - {*NAMES, *ELSEWHERE}:
        found = re.search(r"did you mean '(\w+)'", suggest_key(name, stage))
        assert found is None or found[1] in set(Config.model_fields) - other - INTERNAL, name


@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_no_suggestion_names_a_key_that_does_nothing_in_this_stage(stage):
    """A third of the other stage's keys and of those that do nothing, misspelt in one of ways.

    Every key in every way is a slow test: a search takes milliseconds.
    """
    idle = [*STAGE_KEYS["ppo" if stage == "rm" else "rm"], *IGNORED, *REFUSED, *RENAMED]
    check_suggestions(stage, {misspelt(full)[i % 3] for i, full in enumerate(sorted(idle)[::3])})


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_no_suggestion_for_any_key_names_one_that_does_nothing_in_this_stage(stage):
    check_suggestions(stage, {form for full in NAMES for form in misspelt(full)})


def test_a_slip_in_a_key_that_does_nothing_is_not_taken_for_another_key():
    assert suggest_key("preprocessing_num_worker", "ppo") == (
        "it is close to 'preprocessing_num_workers', which does nothing here; take it out"
    )
    assert suggest_key("ppo_epoch", "rm") == (
        "it is close to 'ppo_epochs', which does nothing to stage rm; take it out"
    )
    assert suggest_key("ppo_epoch", "ppo") == "did you mean 'ppo_epochs'?"


def test_all_keys_without_effect_share_one_line():
    """Those of LLaMA-Factory's other parts and those of the other stage, in the file's order."""
    file = {"ppo_epochs": 2, "overwrite_cache": True, "temperature": 0.7, "ddp_backend": "nccl"}
    (line,) = config_from_dict({**RM, **file}).notes
    assert line.startswith("without effect here (--explain says why): ")
    assert sorted(line.split(": ")[1].split(", ")) == sorted(file)
    remark, line = config_from_dict({**PPO, "lora_dropout": 0.1}).notes
    assert remark == "'lora_dropout' acts in stage rm alone: dropout would change PPO's ratios"
    assert line.endswith(": lora_dropout")
    assert config_from_dict({**PPO, "lora_dropout": 0.0}).notes == ()
    assert STAGE_KEYS["rm"] | STAGE_KEYS["ppo"] <= set(Config.model_fields)


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    base = "".join(f"{key}: {value}\n" for key, value in PPO.items())
    (tmp_path / name).write_text(base + text, encoding="utf-8")
    return tmp_path / name


@pytest.mark.parametrize("text", ["{min_lr: 1e-6}", "{min_lr: 1.0e-6}", "'{\"min_lr\": 1e-6}'"])
def test_numbers_inside_a_mapping_are_numbers_too(tmp_path, text):
    path = write(tmp_path, f"lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {text}\n")
    assert load_config(path).lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_an_override_reaches_into_a_mapping(tmp_path):
    path = write(tmp_path, "lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {power: 2}\n")
    config = load_config(path, ["lr_scheduler_kwargs.lr_end=1e-7"])
    assert config.lr_scheduler_kwargs == {"power": 2, "lr_end": 1e-7}
    config = load_config(path, ["lr_scheduler_kwargs={power: 3}"])
    assert config.lr_scheduler_kwargs == {"power": 3}


def test_json_overrides_and_numbers(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**PPO, "learning_rate": 1e-5}))
    config = load_config(tmp_path / "run.json", ["learning_rate=2e-5", "report_to=wandb,trackio"])
    assert (config.learning_rate, config.trackers) == (2e-5, ("wandb", "trackio"))


@pytest.mark.parametrize(
    ("value", "trackers"),
    [
        ("none", ()),
        (["none"], ()),
        ([], ()),
        ("tensorboard", ("tensorboard",)),
        (["wandb", "tensorboard"], ("wandb", "tensorboard")),
        ("wandb, trackio,wandb", ("wandb", "trackio")),
    ],
)
def test_report_to_in_all_its_spellings(value, trackers):
    assert config_from_dict({**PPO, "report_to": value}).trackers == trackers


def test_report_to_all_is_what_is_installed(monkeypatch):
    present = {"wandb": object(), "trackio": object()}
    monkeypatch.setattr("importlib.util.find_spec", present.get)
    assert config_from_dict({**PPO, "report_to": "all"}).trackers == ("wandb", "trackio")
    assert set(present) < set(TRACKERS)
    assert "report_to" in COMMA_LISTS


@pytest.mark.parametrize(
    ("settings", "steps", "warmup"),
    [
        ({}, 100, 0),
        ({"warmup_ratio": 0.1}, 55, 6),  # rounded up
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, 55, 3),  # the count wins
        ({"warmup_steps": 0.5}, 9, 5),  # as transformers 5 has it
    ],
)
def test_a_warm_up_is_a_count_or_a_share_rounded_up(settings, steps, warmup):
    assert config_from_dict({**PPO, **settings}).warmup(steps) == warmup


def test_what_is_due_when():
    def steps(strategy, every, total, epoch):
        return [s for s in range(1, total + 1) if due(strategy, every, s, total, epoch)]

    assert steps("no", 1, 5, 2) == []
    assert steps("steps", 2, 5, 2) == [2, 4]
    assert steps("steps", 0.3, 10, 2) == [3, 6, 9]  # a share of the run, rounded up
    assert steps("epoch", 1, 6, 2.0) == [2, 4, 6]
    assert steps("epoch", 1, 6, 2.5) == [3, 5]  # the step in which an epoch ends
    assert steps("epoch", 1, 3, 0.5) == [1, 2, 3]  # more than one epoch a step
    assert steps("epoch", 1, 9, 3.0000000000000004) == [3, 6, 9]


def acting(what: str, total: int, epoch: float, **settings) -> list[int]:
    config = config_from_dict({**PPO, **settings})
    return [step for step in range(1, total + 1) if config.acts(what, step, total, epoch)]


def test_logging_saving_and_evaluating_follow_their_keys():
    assert acting("logging", 4, 2) == [1, 2, 3, 4]
    assert acting("logging", 6, 2, logging_steps=3) == [3, 6]
    assert acting("logging", 6, 2, logging_steps=3, logging_first_step=True) == [1, 3, 6]
    assert acting("logging", 4, 2, logging_strategy="no") == []
    assert acting("save", 6, 3, save_steps=4) == [4]
    assert acting("save", 6, 3, save_strategy="epoch") == [3, 6]
    assert acting("save", 6, 3, save_strategy=False) == []
    assert acting("eval", 6, 3, eval_strategy="steps", eval_steps=2) == [2, 4, 6]
    assert acting("eval", 6, 3, eval_strategy="steps", logging_steps=3) == [3, 6]
    assert acting("eval", 6, 3, eval_strategy="steps", eval_steps=2, eval_delay=3) == [4, 6]
    assert acting("eval", 6, 3, eval_strategy="epoch", eval_delay=2) == [6]
    assert acting("eval", 6, 3) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lr_scheduler_kwargs": {"power": 2}},
            "lr_scheduler_kwargs: linear knows no power; it takes nothing",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 0}},
            "lr_scheduler_kwargs: cosine knows no min_lr; it takes num_cycles",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "needs min_lr or min_lr_rate; write for example lr_scheduler_kwargs: {min_lr: 1e-6}",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs num_decay_steps"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "follows evaluations of stage rm"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1e-6}},
            "lr_scheduler_kwargs: lr_end: -1e-06 is a learning rate below 0",
        ),
        (
            {
                "lr_scheduler_type": "cosine_warmup_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 0, "warmup_lr_rate": -0.1},
            },
            "lr_scheduler_kwargs: warmup_lr_rate: -0.1 is a learning rate below 0",
        ),
        ({"save_steps": 2.5}, "save_steps: above 1 it is a count of steps"),
        ({"warmup_steps": 2.5}, "warmup_steps: above 1 it is a count of steps"),
        ({"report_to": "wandb,mlflow"}, "report_to: 'mlflow' is none of tensorboard"),
        ({"early_stopping_steps": 2}, "early_stopping_steps: counts evaluations; set eval_str"),
        ({"save_steps": 0}, "save_steps: 0 is wrong; it should be greater than 0"),
    ],
)
def test_settings_of_training_that_do_not_go_together(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config_from_dict({**PPO, **settings})
