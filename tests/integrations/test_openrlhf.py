"""OpenRLHF 0.11.2's losses and log-probs, and ours in their place."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType

import pytest
import torch

from tests.peers import theirs

pytestmark = pytest.mark.peers

VARIANTS = [
    {},
    {"dual_clip": 3.0, "token_level_loss": False},
    {"policy_loss_type": "gspo", "clip_eps_low": 0.1},
    {
        "is_correction_level": "token",
        "is_correction_mode": "mask",
        "is_correction_threshold": (0.8, 1.3),
    },
    {
        "is_correction_level": "token",
        "is_correction_mode": "clip",
        "is_correction_threshold": (0.8, 1.3),
    },
]
GLOBAL = {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 8.0}


@pytest.fixture(scope="module")
def ours():
    """Our module on OpenRLHF's two, which are loaded without the package around them."""
    for module in ("loss", "utils"):
        theirs.openrlhf(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bare module has no version
        return importlib.import_module("fastppo.integrations.openrlhf")


def results(loss, b, *given, **keywords):
    leaf = b.logprob.clone().requires_grad_()
    found = loss(leaf, b.old_logprob, *given, **keywords)
    found = found if isinstance(found, tuple) else (found,)
    return [*(x for x in found if x is not None), *torch.autograd.grad(found[0], leaf)]


@pytest.mark.parametrize("counts", [{}, GLOBAL])
@pytest.mark.parametrize("settings", VARIANTS)
def test_policy_loss(ours, settings, counts):
    """The loss, all that is returned beside it, and the gradient."""
    mine, other = (module.PolicyLoss(**settings) for module in (ours, theirs.openrlhf("loss")))
    for b in theirs.batches():
        given = (b.advantage, b.mask, b.ref_logprob)
        for x, y in zip(
            results(mine, b, *given, **counts), results(other, b, *given, **counts), strict=True
        ):
            torch.testing.assert_close(x.double(), y.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("counts", [{}, GLOBAL])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(ours, clip, counts):
    mine, other = (module.ValueLoss(clip) for module in (ours, theirs.openrlhf("loss")))
    for b in theirs.batches():
        given = (b.advantage, b.mask)
        for x, y in zip(
            results(mine, b, *given, **counts), results(other, b, *given, **counts), strict=True
        ):
            torch.testing.assert_close(x.double(), y.double(), rtol=1e-6, atol=1e-7)


def test_log_probs(ours):
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 11), torch.randint(11, (3, 4))
    kept = logits.clone()
    expected = theirs.openrlhf("utils").log_probs_from_logits(logits.clone(), labels, 0.7)
    torch.testing.assert_close(ours.log_probs_from_logits(logits, labels, 0.7), expected)
    assert torch.equal(logits, kept)


def test_install_reaches_the_modules_that_have_imported_the_names(ours, monkeypatch):
    actor = ModuleType("openrlhf.trainer.ray.ppo_actor")
    loss, utils = theirs.openrlhf("loss"), theirs.openrlhf("utils")
    actor.PolicyLoss = loss.PolicyLoss
    monkeypatch.setitem(sys.modules, actor.__name__, actor)
    for module in (loss, utils):  # monkeypatch puts them back
        for name in ours.THEIRS.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, getattr(module, name))
    ours.install("PolicyLoss")
    assert actor.PolicyLoss is loss.PolicyLoss is ours.PolicyLoss
    assert loss.ValueLoss is ours.THEIRS["ValueLoss"]
    ours.install()
    assert loss.ValueLoss is ours.ValueLoss
    assert utils.log_probs_from_logits is ours.log_probs_from_logits
    with pytest.raises(ValueError, match=r"one of PolicyLoss, .* came Loss"):
        ours.install("Loss")


@pytest.mark.parametrize(
    "settings",
    [
        {"is_correction_level": "seq"},
        {
            "is_correction_level": "token",
            "is_correction_gating": "tv",
            "is_correction_threshold": (0, 1),
        },
        {"is_correction_level": "token", "policy_loss_type": "gspo"},
    ],
)
def test_corrections_that_are_not_taken_are_refused(ours, settings):
    with pytest.raises(ValueError, match="do not install PolicyLoss for it"):
        ours.PolicyLoss(**settings)
