"""`fp16: true` in stage rm: transformers' loop with our loss scaler, on a CPU too."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.amp import GradScaler

from fastppo.config import Config
from fastppo.errors import TrainingStopped
from fastppo.rm import train as reward_model
from fastppo.rm.model import pair_loss
from fastppo.run.preflight import check
from tests.tiers import slow_unless
from tests.tiny import preferences

FIRST = 2.0**26  # so large that a tiny model's gradients overflow at first
PAIRS = preferences(16)


@pytest.fixture
def train(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run stage rm in float16 from a loss scale of `scale`; its training log and its weights."""

    def make(name: str, scale: float = 2.0**16, **changes: Any) -> tuple[list[Any], Any]:
        (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
        monkeypatch.setattr(
            "fastppo.rm.train.make_scaler",
            lambda autocast, _: autocast and GradScaler("cpu", init_scale=scale),
        )
        settings = {
            "stage": "rm",
            "model_name_or_path": str(model_dir),
            "dataset": str(tmp_path / "pairs.json"),
            "template": "chatml",
            "output_dir": str(tmp_path / name),
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "max_steps": 8,
            "fp16": True,
            **changes,
        }
        config = Config(**settings)
        reward_model.run(config, check(config))
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        weights = {}
        for file in ("adapter_model.safetensors", "value_head.safetensors"):
            weights |= load_file(tmp_path / name / file)
        return [entry for entry in log if "loss" in entry], weights

    return make


def test_a_run_is_float32s_but_for_float16s_rounding(train, model_dir):
    settings = {"stage": "rm", "model_name_or_path": str(model_dir), "template": "chatml"}
    config = Config(**settings, dataset="x", output_dir="y", fp16=True)
    model = reward_model.load_trainable_model(config, torch.device("cpu"))
    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.float16)}
    half, _ = train("half")
    exact, _ = train("exact", fp16=False)
    for mine, other in zip(half, exact, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-2)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-2)
    assert [(entry["loss_scale"], entry["overflow_steps"]) for entry in half] == [(65536.0, 0)] * 8
    assert not {"loss_scale", "overflow_steps"} & exact[0].keys()


@pytest.mark.parametrize(
    ("optim", "max_grad_norm"),
    slow_unless(
        lambda optim, max_grad_norm: optim == "adamw_torch_fused" and max_grad_norm > 0,
        itertools.product(["adamw_torch_fused", "adamw_torch"], [1.0, 0.0]),
    ),
)
def test_an_overflow_skips_the_step_halves_the_scale_is_counted_and_the_run_goes_on(
    train, capsys, optim, max_grad_norm
):
    """The schedule waits in such a step; max_bad_steps does not count it."""
    log, weights = train(
        "run", scale=FIRST, optim=optim, max_grad_norm=max_grad_norm, max_bad_steps=1, max_steps=20
    )
    skipped = [entry["overflow_steps"] for entry in log]
    assert skipped[:3] == [1, 2, 3]
    assert skipped[-1] == skipped[-2] < 15, "the scale was found, and steps are taken"
    assert all(entry["loss_scale"] == FIRST * 0.5 ** entry["overflow_steps"] for entry in log)
    rates = [entry["learning_rate"] for entry in log]
    steps = range(1, len(log))
    waits = [rates[i] == rates[i - 1] for i in steps]
    assert waits == [skipped[i - 1] > (skipped[i - 2] if i > 1 else 0) for i in steps]
    assert all(x.isfinite().all() for x in weights.values())
    assert log[-1]["loss"] < log[0]["loss"]
    said = " ".join(capsys.readouterr().out.split())
    assert f"the gradient of step 1 is beyond float16's range at a loss scale of {FIRST:g}" in said
    assert said.count("beyond float16's range") == 1


def test_a_loss_that_is_not_finite_is_no_overflow(train, monkeypatch):
    monkeypatch.setattr("fastppo.rm.trainer.pair_loss", lambda scores: scores.sum() * float("inf"))
    with pytest.raises(TrainingStopped, match="overflows float16, and bf16: true would not"):
        train("run", max_bad_steps=2)


@pytest.mark.parametrize(
    "optim", ["adamw_torch_fused", pytest.param("adamw_torch", marks=pytest.mark.slow)]
)
@pytest.mark.slow  # the fast tier resumes in another precision, below
def test_a_run_resumes_to_the_bit_with_its_scale(train, tmp_path, optim):
    unbroken, weights = train("run", scale=FIRST, save_steps=3, optim=optim)
    (tmp_path / "on").mkdir()
    resumed, again = train(
        "on",
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"),
        optim=optim,
    )
    assert resumed == unbroken
    assert unbroken[2]["loss_scale"] < FIRST
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[k], again[k]) for k in weights)


@pytest.mark.parametrize("then", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_goes_on_in_another_precision(train, tmp_path, then):
    """The scale begins anew, or is left behind with fp16."""
    train("run", fp16=then, save_steps=3, max_steps=3)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    log, weights = train("on", fp16=not then, resume_from_checkpoint=checkpoint)
    assert [entry["step"] for entry in log] == list(range(1, 9))
    assert ("loss_scale" in log[-1]) != then
    assert all(x.isfinite().all() for x in weights.values())


@pytest.mark.slow  # three runs; the fast tier has a step of PPO's (tests/ppo/test_fp16.py)
def test_small_gradients_are_lost_without_the_scaler_and_with_it_are_not(train, monkeypatch):
    """A ten-millionth of the loss: Adam's step has one size for any gradient but 0."""
    monkeypatch.setattr("fastppo.rm.trainer.pair_loss", lambda scores: 1e-7 * pair_loss(scores))
    keys = {"max_steps": 1, "adam_epsilon": 1e-30, "max_grad_norm": 0.0}
    exact, scaled, bare = (
        torch.cat([x.flatten() for name, x in weights.items() if "lora_B" in name])
        for _, weights in (
            train("exact", fp16=False, **keys),
            train("scaled", **keys),
            train("bare", scale=1.0, **keys),
        )
    )
    assert bare.abs().max() == 0, "B begins at 0, and stayed there"
    assert (scaled != 0).float().mean() > 0.95
    assert (scaled.sign() == exact.sign()).float().mean() > 0.95
