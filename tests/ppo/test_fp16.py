"""`fp16: true` in stage ppo: the loss scaler finds its scale, and loses no gradient on the way."""

from __future__ import annotations

import copy
import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.amp import GradScaler
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo.errors import Interrupted, TrainingStopped, UserError
from fastppo.models.batch import make_batch
from fastppo.ppo import checkpoint, guards, rollout, trainer, update
from fastppo.ppo.optimizer import make_optimizer
from fastppo.ppo.ptx import ptx_backward
from fastppo.ppo.update import Totals, clip_and_step, forward_backward, mini_batches
from tests.tiers import slow_unless

FIRST = 2.0**22  # so large that a tiny model's gradients overflow at first


@pytest.fixture
def fp16_state(state, monkeypatch):
    """A run in float16 whose loss scale begins at `scale`."""

    def make(scale: float = 2.0**16, **changes: Any) -> trainer.State:
        monkeypatch.setattr(
            "fastppo.ppo.state.make_scaler", lambda *_: GradScaler("cpu", init_scale=scale)
        )
        return state(fp16=True, **{"max_steps": 9, **changes})

    return make


def learned(run: trainer.State) -> list[torch.Tensor]:
    """Weights and Adam's moments, a copy."""
    moments = [x for one in run.optimizer.state.values() for x in one.values()]
    tensors = [*checkpoint.trainable_parameters(run), *moments]
    return [x.detach().clone() for x in tensors if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(("kind", "critic"), [("lora", "adapter"), ("full", "model")])
def test_the_base_is_float16_and_what_trains_is_float32(state, kind, critic):
    run = state(fp16=True, finetuning_type=kind, critic=critic)
    assert isinstance(run.scaler, GradScaler)
    trained = set(checkpoint.trainable_parameters(run))
    assert {p.dtype for p in trained} == {torch.float32}
    for role in ("actor", "reference", "critic"):
        frozen = [p for p in run.roles.places[role].model.parameters() if p not in trained]
        assert {p.dtype for p in frozen} <= {torch.float16}
    row = trainer.step_update(run).metrics.rows[0]
    assert (row["kl"], row["overflow_steps"], row["loss_scale"]) == (0.0, 0.0, 65536.0)
    assert row["optimizer_steps"] == 2
    assert {p.dtype for p in trained} == {torch.float32}


def test_without_fp16_there_is_no_scaler_and_no_column_of_one(state):
    for changes in ({}, {"bf16": True}):
        run = trainer.step_update(state(**changes))
        assert run.scaler is None
        named = {"overflow_steps", "loss_scale", "guard_overflow"}
        assert not named & {*run.metrics.rows[0], *run.metrics.columns}


@pytest.mark.parametrize(
    "optim", ["adamw_torch_fused", pytest.param("adamw_torch", marks=pytest.mark.slow)]
)
def test_an_overflow_skips_the_step_halves_the_scale_is_counted_and_the_run_goes_on(
    fp16_state, optim
):
    """No max_bad_steps counts them: more in a row than those are how a scale is found."""
    run = fp16_state(scale=FIRST, optim=optim, max_bad_steps=1, lr_scheduler_type="linear")
    before, scale, rates = learned(run), FIRST, [run.scheduler.get_last_lr()[0]]
    row = {"optimizer_steps": 0}
    # Until both steps of a rollout were taken; one without a vowel has no gradient to overflow.
    while run.step < 8 and not (row["optimizer_steps"] == 2 and row["grad_norm_actor"] > 0):
        row = trainer.step_update(run).metrics.rows[-1]
        rates.append(run.scheduler.get_last_lr()[0])
        assert row["overflow_steps"] + row["optimizer_steps"] == 2
        assert row["skipped_steps"] == row["overflow_steps"]
        scale *= 0.5 ** row["overflow_steps"]
        assert row["loss_scale"] == run.scaler.get_scale() == scale
        assert (row["nonfinite_steps"], row["nonfinite_run"], row["guard_nonfinite"]) == (0, 0, 0)
        if row["optimizer_steps"] == 0:
            assert all(torch.equal(a, b) for a, b in zip(before, learned(run), strict=False))
            assert rates[-1] == rates[-2], "the schedule waits for a step"
        else:
            assert rates[-1] < rates[-2]
    rows = run.metrics.rows
    assert rows[0]["overflow_steps"] == 2, "both steps of the first rollout"
    assert rows[-1]["optimizer_steps"] == 2, "and none of the last"
    assert any(not torch.equal(a, b) for a, b in zip(before, learned(run), strict=False))
    assert all(x.isfinite().all() for x in learned(run))
    warned = [line for i in range(len(rows)) for line in guards.warnings(rows[: i + 1])]
    (line,) = [line for line in warned if "guard_overflow" in line]
    assert "2 optimiser steps were skipped" in line
    assert f"the loss scale is {FIRST / 4:g} now" in line


def test_a_loss_that_is_not_finite_is_no_overflow(fp16_state, monkeypatch):
    """Halving the scale would not mend it: max_bad_steps stops the run, and says what may be."""

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        experience = inner(*args, **kwargs)
        experience.advantage_N[0] = float("inf")
        return experience

    inner = trainer.estimate
    monkeypatch.setattr(trainer, "estimate", spoiled)
    run = fp16_state(max_bad_steps=2)
    with pytest.raises(TrainingStopped, match="overflows float16, and bf16: true would not"):
        trainer.step_update(run)
    row = run.metrics.rows[-1]
    assert (row["overflow_steps"], row["nonfinite_steps"], row["optimizer_steps"]) == (0, 2, 0)


def test_a_scale_that_cannot_fall_further_makes_the_gradient_a_bad_one(
    tiny_roles, config, rollout, experience_of, monkeypatch
):
    settings = config(fp16=True)
    made = tiny_roles(fp16=True)
    experience, optimizer = experience_of(made, rollout, settings), make_optimizer(settings, made)

    def infinite(*args: Any, **kwargs: Any) -> Any:
        made.trainable_parameters("actor")[0].grad[0, 0] = float("inf")
        return inner(*args, **kwargs)

    inner = update.clip_and_step
    monkeypatch.setattr(update, "clip_and_step", infinite)
    found = []
    for scale in (4.0, 1.0):
        scaler = GradScaler("cpu", init_scale=scale)
        found.append(update.update(made, experience, settings, optimizer, seed=0, scaler=scaler))
    assert [(row["overflow_steps"], row["nonfinite_steps"]) for row in found] == [(2, 0), (0, 2)]


def gradients(made: Any, rollout: Any, experience: Any, settings: Any, scale: float | None) -> Any:
    """Adapters' gradients of one mini-batch by role, divided by the scale they were made with."""
    (mini,) = mini_batches(experience, settings, seed=0)
    trained = {role: made.places[role].trainable for role in ("actor", "critic")}
    for parameters in trained.values():
        for parameter in parameters:
            parameter.grad = None
    made.train()
    factor = None if scale is None else torch.tensor(scale)
    batch, totals = make_batch(rollout, mini.rows), Totals()
    forward_backward(made, experience, batch, mini, settings, totals, loss_scale=factor)
    found = {
        role: torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        for role, parameters in trained.items()
    }
    return {role: grad / (scale or 1.0) for role, grad in found.items()}, totals.read()


def test_small_gradients_are_lost_without_the_scaler_and_with_it_are_not(
    tiny_roles, config, rollout, experience_of
):
    """Advantages and a critic's head of 1e-6: below float16's least number before the adapters."""
    keys = {"vf_coef": 1.0, "cliprange_value": None}
    settings, exact = config(fp16=True, **keys), config(**keys)
    whole, half = tiny_roles(), tiny_roles(fp16=True)
    with torch.no_grad():
        for made in (whole, half):
            made.critic_head.weight.mul_(1e-6)
            made.critic_head.bias.zero_()
    experience = experience_of(whole, rollout, exact)
    small = replace(
        experience,
        advantage_N=1e-6 * experience.advantage_N,
        return_N=torch.full_like(experience.return_N, 1e-3),
    )
    wanted, _ = gradients(whole, rollout, small, exact, None)
    bare, without = gradients(half, rollout, small, settings, None)
    scaled, with_it = gradients(half, rollout, small, settings, 2.0**20)
    for role in ("actor", "critic"):
        norm = wanted[role].norm()
        assert (scaled[role] - wanted[role]).norm() < 0.02 * norm, role
        assert bare[role].norm() < 0.01 * norm, role
    assert without == with_it, "the metrics are those of the loss without its scale"


def test_the_gradient_of_written_answers_is_scaled_as_the_others_are(tiny_roles, rollout):
    made, batch = tiny_roles(), make_batch(rollout, range(4))
    found = []
    for scale in (None, torch.tensor(1024.0)):
        loss = ptx_backward(made, batch, 0.5, loss_scale=scale)
        grads = [p.grad for p in made.trainable_parameters("actor")]
        found.append((loss, torch.cat([g.flatten() for g in grads])))
        for parameter in made.trainable_parameters("actor"):
            parameter.grad = None
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[1][1], 1024 * found[0][1], rtol=1e-4, atol=1e-3)


def test_gradients_are_clipped_after_they_are_unscaled(tiny_roles, config):
    made = tiny_roles(fp16=True)
    optimizer = make_optimizer(config(fp16=True), made)
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 1024.0)
    norms, taken = clip_and_step(optimizer, 1.0, torch.tensor(True), scaler)
    assert taken
    for role in ("actor", "critic"):
        count = sum(p.numel() for p in made.trainable_parameters(role))
        assert norms[role].item() == pytest.approx(count**0.5, rel=1e-4)


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_with_its_scale(fp16_state, tmp_path):
    """In the midst of falling, and of counting towards the next doubling."""
    run = fp16_state(scale=FIRST)
    rows = [trainer.step_update(run).metrics.rows[-1] for _ in range(2)]
    assert rows[-1]["loss_scale"] < FIRST
    folder = checkpoint.save_to_resume(run, tmp_path)
    other = fp16_state(metrics_dir=str(tmp_path / "other"))
    assert other.scaler.get_scale() == 2.0**16
    assert not checkpoint.resume(other, folder)
    assert other.scaler.state_dict() == run.scaler.state_dict()
    for _ in range(4):
        mine, theirs = (trainer.step_update(each).metrics.rows[-1] for each in (run, other))
        clocks = {name for name in mine if "second" in name}
        assert {k: v for k, v in mine.items() if k not in clocks} == {
            k: v for k, v in theirs.items() if k not in clocks
        }
    assert other.scaler.state_dict() == run.scaler.state_dict()
    assert run.scaler.state_dict()["_growth_tracker"] > 0
    assert all(torch.equal(a, b) for a, b in zip(learned(run), learned(other), strict=True))


def test_a_dropped_update_leaves_the_scale_as_it_was(fp16_state, monkeypatch):
    run, inner = fp16_state(scale=FIRST), update.clip_and_step

    def signalled(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    before = copy.deepcopy(run.scaler.state_dict())
    monkeypatch.setattr(update, "clip_and_step", signalled)
    with run.stop, pytest.raises(Interrupted):
        trainer.step_update(run)
    assert run.scaler.state_dict() == before


@pytest.mark.parametrize(
    "more",
    slow_unless(
        lambda more: "critic" in more,
        [{"bf16": False}, {"padding_free": True}, {"critic": "shared"}],
    ),
)
def test_a_step_is_float32s_but_for_float16s_rounding(state, more, monkeypatch):
    """Its 11 bits: an eighth of bfloat16's rounding. Both learn from the rollout of fp16."""
    sampled: list[Any] = []

    def sample(*args: Any, **kwargs: Any) -> Any:
        sampled.append(sampled[0] if sampled else rollout.sample(*args, **kwargs))
        return sampled[0]

    monkeypatch.setattr(trainer, "sample", sample)
    rows = [
        trainer.step_update(state(max_new_tokens=16, **keys)).metrics.rows[0]
        for keys in ({**more, "fp16": True}, more)
    ][::-1]
    for name in ("score", "entropy", "policy_loss", "value_loss", "grad_norm_actor"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=2e-2, abs=1e-3), name
    assert rows[1]["ratio_first_pass"] <= 2.5e-3
    assert rows[1]["guard_ratio"] == rows[1]["guard_sampler"] == 0


def test_a_model_that_overflows_float16_is_refused_in_one_line(model_dir, tmp_path, config):
    """As Gemma 3 and others do that were trained in bfloat16."""
    huge = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        huge.model.layers[0].mlp.down_proj.weight.mul_(1e5)
    huge.save_pretrained(tmp_path / "huge")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "huge")
    keys = {"model_name_or_path": str(tmp_path / "huge")}
    with pytest.raises(UserError, match="overflow float16, which ends at 65504; use bf16: true"):
        trainer.init_state(config(fp16=True, **keys))
    assert trainer.init_state(config(bf16=True, **keys)).scaler is None
