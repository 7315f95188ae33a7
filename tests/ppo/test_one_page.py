"""examples/ppo_in_one_page.py is the trainer's arithmetic: the same advantages and gradients."""

from __future__ import annotations

import copy
import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastppo.ppo import update as update_module
from fastppo.ppo.advantage import KLController, RunningScore, estimate
from fastppo.ppo.optimizer import make_optimizer
from fastppo.ppo.update import update

PAGE = Path(__file__).resolve().parents[2] / "examples" / "ppo_in_one_page.py"
# Between the clip's edges and past them, on either side.
LOG_RATIO = [0.25, 0.25, -0.15, 0.6, -0.15, -0.5, 0.6, 0.25, -0.5, 0.0, -0.15]
SETTINGS = {
    "finetuning_type": "full",
    "critic": "shared",
    "optim": "sgd",
    "learning_rate": 1.0,  # so that a step moves the weights by the gradient
    "max_grad_norm": 0,
    "ppo_epochs": 1,
    "cliprange_value": None,
}


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ppo_in_one_page", PAGE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def both(tiny_roles, rollout, experience_of, config, page):
    """Float64 roles with their experience, and the same rollout as the page lays it out."""
    settings = config(**SETTINGS)
    made = tiny_roles(**SETTINGS)
    for model in (made.model, made.places["reference"].model, made.critic_head):
        model.double()
    experience = experience_of(made, rollout, settings)
    first, longest = max(rollout.prompt_lengths), max(rollout.response_lengths)
    ids_BT = torch.zeros(len(rollout.prompts), first + longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, (prompt, whole) in enumerate(
        zip(rollout.prompt_lengths, rollout.lengths, strict=True)
    ):
        place = slice(first - prompt, first - prompt + whole)
        ids_BT[row, place], mask_BT[row, place] = rollout.input_ids_BT[row, :whole], 1
    live_BR = mask_BT[:, first:].bool()
    batch = {"ids": ids_BT, "mask": mask_BT, "token": ids_BT[:, first:], "live": live_BR}
    return made, experience, settings, batch


def test_the_page_has_the_trainers_advantages_and_returns(both, page):
    made, experience, settings, batch = both
    scored, beta = experience.scored, 0.1
    kl_B = page.estimate(
        made.model, made.places["reference"].model, made.critic_head, batch, scored.score_B, beta
    )
    ours = estimate(scored, settings, KLController(beta, 6.0, 10000), RunningScore())
    live_BR = batch["live"]
    close = {"atol": 1e-10, "rtol": 0}
    torch.testing.assert_close(batch["logprob"][live_BR], scored.logprob_N, **close)
    torch.testing.assert_close(batch["advantage"][live_BR], ours.advantage_N, **close)
    torch.testing.assert_close(batch["return"][live_BR], ours.return_N, **close)
    torch.testing.assert_close(kl_B.sum(), ours.kl_N.sum(), **close)
    assert kl_B.abs().max() > 0.01


def test_the_page_has_the_trainers_gradients(both, page, monkeypatch):
    """In float64, with ratios past both clips, through the whole model and the critic's head."""
    made, experience, settings, batch = both
    log_ratio_N = torch.tensor(LOG_RATIO, dtype=torch.float64)
    old_N = experience.scored.logprob_N - log_ratio_N
    experience = replace(experience, scored=replace(experience.scored, logprob_N=old_N))
    for name, x_N in (
        ("logprob", old_N),
        ("advantage", experience.advantage_N),
        ("return", experience.return_N),
    ):
        batch[name] = torch.zeros_like(batch["live"], dtype=torch.float64)
        batch[name][batch["live"]] = x_N
    model, head = copy.deepcopy(made.model), copy.deepcopy(made.critic_head)
    parameters = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    page_gradients = torch.autograd.grad(page.ppo_loss(model, head, batch), parameters)

    trained = [
        p for p in (*made.model.parameters(), *made.critic_head.parameters()) if p.requires_grad
    ]
    before = [p.detach().clone() for p in trained]
    monkeypatch.setattr(update_module, "check_first_pass", lambda *_: None)
    update(made, experience, settings, make_optimizer(settings, made), seed=0)
    for was, now, gradient in zip(before, trained, page_gradients, strict=True):
        torch.testing.assert_close(was - now, gradient, atol=1e-10, rtol=0)
    assert max(g.abs().max() for g in page_gradients) > 1e-3


def test_the_page_stands_alone_and_is_a_page():
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) fastppo", text, flags=re.MULTILINE)
    assert len(text.splitlines()) < 150


@pytest.mark.slow
def test_the_page_learns(page, capsys):
    page.main()
    scores = [float(s) for s in re.findall(r"score (\S+),", capsys.readouterr().out)]
    assert scores[0] < 0.15
    assert sum(scores[-5:]) / 5 > 0.4
