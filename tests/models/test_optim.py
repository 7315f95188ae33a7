"""optim: which AdamW, and what its state weighs."""

from __future__ import annotations

import sys
import types
from typing import get_args

import pytest
import torch
from transformers import Trainer, TrainingArguments

from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.models.optim import BITSANDBYTES, create_optimizer
from fastppo.ppo.optimizer import make_optimizer
from fastppo.rm.arguments import training_arguments
from fastppo.run.preflight import check_packages

SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def groups():
    return [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.1}]


@pytest.fixture
def stand_in(monkeypatch):
    """bitsandbytes as far as it matters here: classes that keep what they are called with."""

    class Bits(torch.optim.Optimizer):
        def __init__(self, params, **settings):
            super().__init__(params, settings)

    package = types.ModuleType("bitsandbytes")
    package.optim = types.ModuleType("bitsandbytes.optim")
    for name in ("AdamW", "Lion", "RMSprop"):
        setattr(package.optim, name, type(name, (Bits,), {}))
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", package.optim)
    return package.optim


def transformers_optimizer(name, monkeypatch):
    """What Trainer makes for that name: its class and arguments, the weight decay in the group."""
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: True)
    arguments = TrainingArguments(
        optim=name,
        learning_rate=0.2,
        adam_beta1=SETTINGS["betas"][0],
        adam_beta2=SETTINGS["betas"][1],
        adam_epsilon=SETTINGS["eps"],
        use_cpu=True,
    )
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind([{**group, "weight_decay": 0.1} for group in groups()], **settings)


def arguments_of(optimizer):
    """All that a parameter group holds but its parameters."""
    (group,) = optimizer.param_groups
    return {name: value for name, value in group.items() if name != "params"}


NAMES = get_args(get_args(Config.model_fields["optim"].annotation)[0])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adamw_hf"])
def test_every_optim_is_what_transformers_makes_of_its_name(name, stand_in, monkeypatch):
    """The class, its arguments, and the weight decay."""
    ours, theirs = (
        create_optimizer(name, groups(), **SETTINGS),
        transformers_optimizer(name, monkeypatch),
    )
    assert type(ours) is type(theirs)
    assert arguments_of(ours) == arguments_of(theirs)


@pytest.mark.parametrize("name", [None, "adamw_hf"])
def test_no_name_and_adamw_hf_are_pytorchs_adamw(name, stand_in, monkeypatch):
    """transformers 5 refuses adamw_hf; it was AdamW as it stands in the paper."""
    with pytest.raises(ValueError, match="adamw_hf"):
        transformers_optimizer("adamw_hf", monkeypatch)
    ours, theirs = (
        create_optimizer(name, groups(), **SETTINGS),
        transformers_optimizer("adamw_torch", monkeypatch),
    )
    assert type(ours) is torch.optim.AdamW
    assert arguments_of(ours) == arguments_of(theirs)


@pytest.fixture
def roles(tiny_roles):
    """Made before the stand-in is there, which PEFT would take for bitsandbytes."""
    return tiny_roles()


def test_stage_ppo_hands_its_settings_to_the_optimiser(roles, config, stand_in):
    made = make_optimizer(config(optim="paged_adamw_8bit", adam_beta2=0.95), roles)
    assert type(made) is stand_in.AdamW
    assert made.defaults == {
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "optim_bits": 8,
        "is_paged": True,
    }


@pytest.mark.parametrize("name", sorted(BITSANDBYTES))
def test_without_bitsandbytes_there_is_a_line_that_installs_it(config, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install '\.\[quantization\]'"):
        create_optimizer(name, groups(), **SETTINGS)
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"optim: {name} needs.*pip install '\.\[quantization\]'"):
        check_packages(config(optim=name))
    check_packages(config(optim="adamw_torch"))


def test_stage_rm_hands_the_name_to_transformers(config):
    assert training_arguments(config(optim="adamw_torch"), 8).optim == "adamw_torch"
    assert training_arguments(config(), 8).optim == "adamw_torch_fused"


def test_another_optimiser_is_refused(config):
    with pytest.raises(ValueError, match="adamw_torch"):
        config(optim="lomo")
