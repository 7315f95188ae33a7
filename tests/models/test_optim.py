"""optim: which AdamW, and what its state weighs."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from fastppo.errors import UserError
from fastppo.models.optim import BITSANDBYTES, adamw
from fastppo.ppo.optimizer import make_optimizer
from fastppo.rm.train import training_arguments
from fastppo.run.preflight import check_packages

SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def groups():
    return [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.1}]


@pytest.mark.parametrize("name", [None, "adamw_torch", "adamw_torch_fused"])
def test_pytorchs_own(name):
    made = adamw(name, groups(), **SETTINGS)
    assert type(made) is torch.optim.AdamW
    assert made.defaults["fused"] is (True if name == "adamw_torch_fused" else None)
    (group,) = made.param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.9, 0.95), 1e-6)


@pytest.fixture
def stand_in(monkeypatch):
    """bitsandbytes as far as it matters here: a class that notes what it is called with."""
    calls = []

    class AdamW(torch.optim.AdamW):
        def __init__(self, params, optim_bits=32, is_paged=False, **settings):
            calls.append((optim_bits, is_paged, settings))
            super().__init__(params, **settings)

    module = types.ModuleType("bitsandbytes")
    module.optim = types.SimpleNamespace(AdamW=AdamW)
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    return calls


@pytest.mark.parametrize(
    ("name", "bits", "paged"),
    [
        ("adamw_8bit", 8, False),
        ("adamw_bnb_8bit", 8, False),
        ("paged_adamw_8bit", 8, True),
        ("paged_adamw_32bit", 32, True),
    ],
)
def test_bitsandbytes_by_transformers_names(tiny_roles, config, stand_in, name, bits, paged):
    make_optimizer(config(optim=name, adam_beta2=0.95), tiny_roles())
    ((*asked, settings),) = stand_in
    assert asked == [bits, paged]
    assert settings == {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


@pytest.mark.parametrize("name", sorted(BITSANDBYTES))
def test_without_bitsandbytes_there_is_a_line_that_installs_it(config, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'fastppo\[quantization\]'"):
        adamw(name, groups(), **SETTINGS)
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"optim: {name} needs.*fastppo\[quantization\]"):
        check_packages(config(optim=name))
    check_packages(config(optim="adamw_torch"))


def test_stage_rm_hands_the_name_to_transformers(config):
    assert training_arguments(config(optim="adamw_torch"), 8).optim == "adamw_torch"
    assert training_arguments(config(), 8).optim == "adamw_torch_fused"


def test_another_optimiser_is_refused(config):
    with pytest.raises(ValueError, match="adamw_torch"):
        config(optim="lomo")
