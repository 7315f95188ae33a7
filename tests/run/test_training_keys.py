"""Keys of transformers' that a run honours: each changes what it names, in both stages."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import tracking as accelerate_tracking
from transformers import Adafactor

from fastppo.config import Config
from fastppo.config.training import BITSANDBYTES
from fastppo.errors import UserError
from fastppo.models import optim
from fastppo.ppo import log, trainer
from fastppo.ppo.optimizer import make_optimizer
from fastppo.ppo.state import prompt_order
from fastppo.rm import train as reward_model
from fastppo.run import live, plots, preflight
from fastppo.run.launch import choose_device
from fastppo.run.preflight import check
from fastppo.run.tracking import Trackers, settings
from tests.tiers import slow_unless

PAIRS = [{"instruction": f"Say {i}", "chosen": "aeiou", "rejected": "xyz"} for i in range(10)]


def moved(name: str | None, **changes: float) -> float:
    """Where one step from 1 leads, with gradient 0.5, rate 0.1 and these settings."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = optim.create_optimizer(
        name,
        [{"params": [weight], "lr": 0.1}],
        **{"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, **changes},
    )
    weight.grad = torch.full((1,), 0.5)
    optimizer.step()
    return round(weight.item(), 5)


def test_optim_takes_the_step_of_its_name():
    assert moved("sgd") == 0.95  # 1 - 0.1 * 0.5
    assert moved("sgd", weight_decay=1.0) == 0.85
    assert moved("adagrad") == 0.9  # g / sqrt(g^2)
    assert moved("rmsprop") == 0.0  # g / sqrt(0.01 g^2) is 10
    assert [moved(name) for name in (None, "adamw_torch", "adamw_hf")] == [0.9] * 3
    assert moved("adamw_torch", weight_decay=1.0) == 0.8  # decoupled: 1 - 0.1 * 1, then - 0.1
    assert moved("adamw_torch", eps=0.5) == 0.95  # g / (|g| + 0.5)
    made = optim.create_optimizer(
        "adafactor",
        [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.1}],
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.1,
    )
    assert type(made) is Adafactor
    (group,) = made.param_groups
    assert (group["scale_parameter"], group["relative_step"], group["lr"]) == (False, False, 0.1)


def test_weight_decay_leaves_vectors_alone(config, tiny_roles):
    made = tiny_roles()
    for decay in (0.0, 0.1):
        optimizer = make_optimizer(config(weight_decay=decay), made)
        decays = {
            (p.dim(), group["weight_decay"])
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert decays == {(2, decay), (1, 0.0)}  # the value head's bias is a vector
        assert {group["role"] for group in optimizer.param_groups} == {"actor", "critic"}


def test_lion_is_bitsandbytes(monkeypatch):
    calls: list[dict[str, Any]] = []
    stand_in = types.ModuleType("bitsandbytes")
    stand_in.optim = types.SimpleNamespace(Lion=lambda groups, **settings: calls.append(settings))
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    optim.create_optimizer("paged_lion_8bit", [], betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    assert calls == [{"betas": (0.9, 0.99), "weight_decay": 0.1, "optim_bits": 8, "is_paged": True}]


@pytest.mark.parametrize(
    "name",
    slow_unless(
        lambda name: name in ("sgd", "adafactor", "paged_lion_8bit"),
        ["sgd", "adagrad", "rmsprop", "adafactor", *sorted(BITSANDBYTES)],
    ),
)
def test_every_name_of_optim_makes_an_optimiser_that_ppo_steps_with(state, name):
    run = state(optim=name, ppo_epochs=1)
    before = [p.detach().clone() for p in run.roles.trainable_parameters("actor")]
    row = trainer.step_update(run).metrics.rows[0]
    after = run.roles.trainable_parameters("actor")
    assert row["optimizer_steps"] == 1
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_data_seed_moves_the_order_alone(state):
    run = state(data_seed=0)
    orders = set()
    for seed in (None, 42, 0, 1, 2):
        asked = run.config.model_copy(update={"data_seed": seed})
        orders.add(tuple(prompt_order(asked, len(run.prompts))(0)))
        if seed == 42:
            assert len(orders) == 1  # null is seed, which is 42
    assert len(orders) > 1


def test_tf32_and_use_cpu_reach_torch(config, monkeypatch):
    before = torch.get_float32_matmul_precision()
    try:
        choose_device(config(tf32=True))
        assert torch.get_float32_matmul_precision() == "high"
        choose_device(config(tf32=False))
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(config()).type == "cuda"
    assert choose_device(config(use_cpu=True)).type == "cpu"


def test_the_hubs_token_is_where_its_clients_look(config, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "old")
    preflight.check(config(hf_hub_token="hf_new"))
    assert os.environ["HF_TOKEN"] == "hf_new"
    preflight.check(config())
    assert os.environ["HF_TOKEN"] == "hf_new"


class Recorder:
    """What accelerate's tracker classes do, noted."""

    made: ClassVar[list[Recorder]] = []
    requires_logging_directory = False

    def __init__(self, project: str, **named: Any) -> None:
        self.project, self.named, self.rows, self.closed = project, named, [], False
        type(self).made.append(self)

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.closed = True


class Folders(Recorder):
    requires_logging_directory = True

    def __init__(self, run: str, folder: str, **named: Any) -> None:
        super().__init__(run, folder=folder, **named)


@pytest.fixture
def recorders(monkeypatch):
    """Stand-ins for tensorboard, wandb and trackio, which need not be installed."""
    Recorder.made.clear()
    for name, stand_in in (("tensorboard", Folders), ("wandb", Recorder), ("trackio", Recorder)):
        monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, name, stand_in)
    monkeypatch.setattr(preflight, "check_packages", lambda config: None)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    return Recorder.made


def test_trackers_get_run_project_and_folder(config, recorders, monkeypatch, tmp_path):
    Trackers(config(report_to="wandb,tensorboard", run_name="one", logging_dir="logs"))
    wandb, board = recorders
    identity = {"id": wandb.named["id"], "resume": "allow"}
    assert (wandb.project, wandb.named) == ("fastppo", {"name": "one", **identity})
    assert (board.project, board.named) == ("one", {"folder": "logs"})
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    Trackers(config(report_to="trackio,tensorboard"))
    assert (recorders[2].project, recorders[2].named) == ("mine", {"name": str(tmp_path / "out")})
    assert recorders[3].named == {"folder": str(tmp_path / "out" / "runs")}
    Trackers(config(report_to="wandb", project="named"))
    assert recorders[4].project == "named"
    assert Trackers.of(config()) is None


def test_trackers_are_not_told_the_hubs_token(config):
    told = settings(config(hf_hub_token="hf_secret"))
    assert "hf_secret" not in str(told)
    assert told["learning_rate"] == 1e-3
    assert all(isinstance(value, bool | str | float | int) for value in told.values())


def test_a_tracker_that_does_not_start_is_one_clean_error(config, recorders, monkeypatch):
    monkeypatch.setattr(Recorder, "start", lambda self: 1 / 0)
    with pytest.raises(UserError, match=r"^report_to: wandb does not start \(ZeroDivisionError"):
        Trackers(config(report_to="wandb"))


def test_a_ppo_run_logs_saves_evaluates_and_draws_as_its_keys_say(
    config, recorders, capsys, tmp_path
):
    settings = config(
        max_steps=4,
        ppo_epochs=1,
        logging_steps=3,
        logging_first_step=True,
        save_steps=0.25,
        save_total_limit=1,
        eval_strategy="epoch",
        eval_delay=4,
        report_to="tensorboard,wandb",
        run_name="one",
        plot_loss=True,
    )
    trainer.run(settings, check(settings))
    out, folder = capsys.readouterr().out, tmp_path / "out"
    shown = [line.split("/")[0] for line in out.splitlines() if line.startswith("step ")]
    assert shown == ["step 1", "step 3"]
    assert out.count("evaluation: ") == 1  # the fourth epoch is the last step: not twice
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert sorted(path.name for path in folder.glob("*.png")) == [
        "training_loss.png",
        "training_reward.png",
    ]
    for tracker in recorders:
        assert tracker.closed
        steps = [step for step, row in tracker.rows if "score" in row]
        assert steps == [1, 2, 3, 4]
        assert "eval/reward_after" in tracker.rows[-1][1]


def test_without_plot_loss_and_saving_there_is_neither(config, tmp_path):
    settings = config(max_steps=2, ppo_epochs=1, save_strategy="no", save_steps=1)
    trainer.run(settings, check(settings))
    assert not list((tmp_path / "out").glob("*.png"))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_plotted_loss_is_the_sum_that_was_minimised(config):
    row = {"policy_loss": 1.0, "entropy": 2.0, "value_loss": 3.0, "kl_loss": 0.5, "ptx_loss": 4.0}
    settings = config(vf_coef=0.1, entropy_coef=0.01, ptx_coef=0.25, ptx_dataset="x")
    assert log.total_loss(row, settings) == pytest.approx(1 - 0.02 + 0.3 + 0.5 + 1.0)
    assert log.total_loss({"policy_loss": 1.0, "entropy": 2.0}, config()) == 1.0


def test_the_smoothed_line_starts_at_the_first_value_and_follows():
    # Weights 0.9 and 1 on (1, 2): (0.9 * 1 + 2) / 1.9
    assert plots.smoothed([1.0, 2.0]) == pytest.approx([1.0, 2.9 / 1.9])
    assert plots.smoothed([3.0] * 5) == pytest.approx([3.0] * 5)


@pytest.fixture
def pairs(config, tmp_path):
    """Stage rm on ten pairs."""
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(PAIRS))

    def make(**changes: Any) -> Config:
        base = {"stage": "rm", "reward_model": None, "reward_model_type": "lora"}
        return config(**base, dataset=str(path), val_size=2, **changes)

    return make


def test_a_reward_run_logs_saves_evaluates_and_draws_as_its_keys_say(
    pairs, recorders, capsys, tmp_path
):
    settings = pairs(
        max_steps=4,
        per_device_train_batch_size=2,
        logging_steps=2,
        save_steps=0.5,
        save_total_limit=1,
        eval_strategy="steps",
        report_to="wandb",
        run_name="pairs",
        plot_loss=True,
    )
    reward_model.run(settings, check(settings))
    folder: Path = tmp_path / "out"
    out = capsys.readouterr().out
    shown = [line.split("/")[0] for line in out.splitlines() if line.startswith("step ")]
    assert shown == ["step 2", "step 4"]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert sorted(path.name for path in folder.glob("*.png")) == [
        "training_eval_accuracy.png",
        "training_eval_loss.png",
        "training_loss.png",
    ]
    (wandb,) = recorders
    assert (wandb.named["name"], wandb.closed) == ("pairs", True)
    assert {step for step, row in wandb.rows if "train/loss" in row} == {2, 4}
    assert any("eval/accuracy" in row for _, row in wandb.rows)


def test_early_stopping_in_stage_rm_stops(pairs, tmp_path):
    settings = pairs(
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=0.0,  # nothing gets better
        eval_strategy="steps",
        eval_steps=1,
        early_stopping_steps=2,
        metric_for_best_model="accuracy",
    )
    reward_model.run(settings, check(settings))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type", "polynomial"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}},
            "lr_scheduler_kwargs",
            {"power": 2},
        ),
        ({"warmup_ratio": 0.1, "max_steps": 15}, "warmup_steps", 2),
        ({"optim": "adamw_hf"}, "optim", "adamw_torch"),
        ({"optim": "sgd"}, "optim", "sgd"),
        ({"weight_decay": 0.1}, "weight_decay", 0.1),
        ({"adam_beta1": 0.8}, "adam_beta1", 0.8),
        ({"adam_beta2": 0.9}, "adam_beta2", 0.9),
        ({"adam_epsilon": 1e-5}, "adam_epsilon", 1e-5),
        ({"max_grad_norm": 0.0}, "max_grad_norm", 0.0),
        ({"seed": 3}, "seed", 3),
        ({"data_seed": 3}, "data_seed", 3),
        ({"max_steps": 500}, "logging_steps", 10),
        ({"max_steps": 20}, "logging_steps", 2),
        ({"max_steps": 20, "logging_steps": 10}, "logging_steps", 10),
        ({"logging_first_step": True}, "logging_first_step", True),
        ({"logging_strategy": "epoch"}, "logging_strategy", "epoch"),
        ({"save_strategy": "epoch"}, "save_strategy", "epoch"),
        ({"save_steps": 7}, "save_steps", 7),
        ({"save_total_limit": 2}, "save_total_limit", 2),
        ({"save_only_model": True}, "save_only_model", True),
        ({"eval_strategy": "steps", "logging_steps": 3}, "eval_steps", 3),
        ({"eval_strategy": "steps", "eval_steps": 0.5}, "eval_steps", 0.5),
        ({"eval_strategy": "epoch", "eval_delay": 2}, "eval_delay", 2),
        ({"eval_on_start": True}, "eval_on_start", True),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model", "accuracy"),
        ({"greater_is_better": False}, "greater_is_better", False),
        ({"num_train_epochs": 2.5}, "num_train_epochs", 2.5),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps", 3),
        ({"per_device_eval_batch_size": 3}, "per_device_eval_batch_size", 3),
    ],
    ids=str,
)
def test_stage_rm_hands_each_key_on(pairs, changes, name, value):
    made = reward_model.training_arguments(pairs(**changes), 100)
    assert getattr(made, name) == value


def test_disable_shuffling_keeps_the_order_of_pairs(pairs, monkeypatch):
    seen: list[list[int]] = []
    real = reward_model.collate

    def collate(batch, pad_id):
        seen.append([pair.prompt_ids[-20:] for pair in batch])
        return real(batch, pad_id)

    def order(**changes):
        seen.clear()
        settings = pairs(
            max_steps=4, per_device_train_batch_size=2, overwrite_output_dir=True, **changes
        )
        records = check(settings)
        monkeypatch.setattr(reward_model, "collate", collate)
        reward_model.run(settings, records)
        return [row for batch in seen[:4] for row in batch]

    in_order = order(disable_shuffling=True)
    assert order(disable_shuffling=True, data_seed=9, seed=42) == in_order
    assert order() != in_order


@pytest.fixture
def bars(monkeypatch):
    """The progress bars that were made."""
    made = []
    real = live.LiveView

    def view(*args):
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(live, "LiveView", view)
    return made


def test_disable_tqdm_false_draws_a_bar_in_both_stages(config, pairs, bars):
    settings = config(max_steps=2, ppo_epochs=1, disable_tqdm=False)
    trainer.run(settings, check(settings))
    settings = pairs(max_steps=3, overwrite_output_dir=True, disable_tqdm=False)
    reward_model.run(settings, check(settings))
    assert [(bar.disable, bar.tasks[0].completed, bar.tasks[0].total) for bar in bars] == [
        (False, 2, 2),
        (False, 3, 3),
    ]
    assert live.LiveView(config(), 2, 0).disable
