"""Learning-rate schedules: each step learns, and behind the warm-up they are transformers' own."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from fastppo.config import Config
from fastppo.config.training import SCHEDULES
from fastppo.errors import UserError
from fastppo.ppo.optimizer import idle_steps, make_scheduler
from fastppo.rm import train as reward_model
from fastppo.run.preflight import check

PAIRS = [{"instruction": f"Say {i}", "chosen": "aeiou", "rejected": "xyz"} for i in range(10)]


def rates(config: Config, steps: int) -> list[float]:
    """The learning rate of each of `steps` steps, of a peak of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = make_scheduler(config, optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [round(rate, 6) for rate in found]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1, 0.75, 0.5, 0.25]),
        ({"warmup_ratio": 0.3}, [0.5, 1, 1, 0.5]),  # ceil(1.2) steps; first and last learn
        ({"lr_scheduler_type": "constant"}, [1, 1, 1, 1]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, [0.5, 1, 1, 1]),
        ({"lr_scheduler_type": "cosine"}, [1, 0.853553, 0.5, 0.146447]),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1.0}},
            [1, 0.5, 0, 0.5],
        ),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
            [1, 0.5, 1, 0.5],
        ),
        (
            {
                "lr_scheduler_type": "polynomial",
                "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.2},
            },
            [1, 0.65, 0.4, 0.25],  # 0.8 (1 - t)^2 + 0.2
        ),
        (
            {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.2},
            },
            [1, 0.882843, 0.6, 0.317157],
        ),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 2, "decay_type": "linear"},
            },
            [1, 1, 1, 0.5],
        ),
        (
            {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 4}},
            [1, 0.894427, 0.816497, 0.755929],  # sqrt(4 / (t + 4))
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_schedules_by_hand(config, changes, expected):
    found = rates(config(**changes), 4)
    assert found == pytest.approx(expected, abs=1e-5)


# What a schedule needs, with no 0 in it.
NEEDS = {
    "cosine_with_min_lr": {"min_lr": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 1},
}


@pytest.mark.parametrize("kind", sorted(set(SCHEDULES) - {"reduce_lr_on_plateau"}))
@pytest.mark.parametrize(("warmup", "steps"), [(0, 4), (1, 1), (1, 2), (1, 4), (2, 4), (7, 30)])
def test_every_step_learns_and_after_its_peak_as_transformers_has_it(config, kind, warmup, steps):
    given = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": NEEDS.get(kind)}
    found = rates(config(**given, warmup_steps=warmup), steps)
    assert min(found) > 0
    rising = found[:warmup]
    assert rising == sorted(rising)
    assert not rising or rising[-1] == 1
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, warmup, steps, NEEDS.get(kind)).lr_lambdas[0]
    assert found[warmup:] == [round(theirs(step), 6) for step in range(warmup, steps)]


def test_steps_that_learn_nothing_are_counted(config):
    def idle(**changes: Any) -> int:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        return idle_steps(make_scheduler(config(**changes), optimizer, 10), 10)

    assert idle() == idle(warmup_steps=3) == 0
    short = {"num_decay_steps": 2, "num_stable_steps": 3}
    assert idle(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=short) == 5


def test_stage_rm_learns_from_the_first_pairs_of_a_warm_up(config, tmp_path):
    """One step of a warm-up of five: LoRA's B starts at 0, and has to have left it."""
    data = tmp_path / "pairs.json"
    data.write_text(json.dumps(PAIRS))
    settings = config(
        stage="rm", reward_model=None, dataset=str(data), warmup_steps=5, max_steps=1, val_size=0.0
    )
    reward_model.run(settings, check(settings))
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_the_kwargs_of_each_schedule_are_those_of_transformers():
    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"}
    for name, kwargs in SCHEDULES.items():
        function = TYPE_TO_SCHEDULER_FUNCTION[name]
        if name == "reduce_lr_on_plateau":
            function = torch.optim.lr_scheduler.ReduceLROnPlateau.__init__
            known = set(inspect.signature(function).parameters) - {"self", "verbose"}
        else:
            known = set(inspect.signature(function).parameters)
        assert known - given == kwargs, name
    assert set(TYPE_TO_SCHEDULER_FUNCTION) - set(SCHEDULES) <= {"greedy"}


def test_a_schedule_that_refuses_a_value_is_one_clean_error(config):
    wrong = config(
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 2, "decay_type": "steep"},
    )
    with pytest.raises(UserError, match=r"^lr_scheduler_kwargs: "):
        rates(wrong, 4)
