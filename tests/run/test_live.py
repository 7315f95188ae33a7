"""The live view: what it draws on a terminal, and that without one lines stay plain."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from fastppo.ppo import trainer
from fastppo.run import console, live, tracking
from fastppo.run.preflight import check


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, soft_wrap=True)


def test_a_sparkline_rises_with_its_values_and_fits():
    assert live.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == live.BLOCKS
    assert live.sparkline([3.0, 3.0]) == "▁▁"
    assert live.sparkline([0.0, math.nan, 1.0]) == "▁ █"
    assert live.sparkline(range(800), 8) == live.BLOCKS
    assert live.sparkline([]) == ""


@pytest.mark.parametrize("width", [30, 80])
def test_no_line_is_wider_than_the_terminal(config, monkeypatch, width):
    monkeypatch.setattr(console, "console", terminal(width))
    view = live.LiveView(config(), 10, 0)
    view.curves = {"score": [0.1 * i for i in range(100)]}
    view.sample = ("[bold]a prompt\nin two lines", "an answer " * 50, 0.5)
    view.warnings = ["one " * 40, "two " * 40, "three " * 40]
    capture = Console(file=io.StringIO(), width=width)
    capture.print(view.get_renderable())
    lines = capture.file.getvalue().splitlines()
    assert len(lines) == 6  # the bar, a curve, prompt, sample, two warnings
    assert all(len(line) <= width for line in lines)
    assert "[bold]a prompt in" in lines[2]  # as it stands, on one line
    assert "three" in lines[5]


def test_the_view_is_for_terminals_and_disable_tqdm_true_leaves_plain_lines(config, monkeypatch):
    assert live.LiveView(config(), 2, 0).disable
    monkeypatch.setattr(console, "console", terminal())
    assert not live.LiveView(config(), 2, 0).disable
    assert live.LiveView(config(disable_tqdm=True), 2, 0).disable


def test_a_run_shows_each_step_its_sample_and_its_warnings(config, monkeypatch):
    views: list[Any] = []

    class View(live.LiveView):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            views.append(self)

    monkeypatch.setattr(live, "LiveView", View)
    settings = config(max_steps=2, ppo_epochs=1, ppo_target=1e-9)  # so that guard_kl fires
    trainer.run(settings, check(settings))
    (view,) = views
    assert [len(values) for values in view.curves.values()] == [2, 2]
    prompt, response, score = view.sample
    assert prompt
    assert isinstance(response, str)
    assert math.isfinite(score)
    assert [line.split(":")[0] for line in view.warnings] == ["guard_kl"]


class Wandb:
    def log_table(self, name: str, *, columns: list[str], data: list[Any], step: int) -> None:
        self.table = (name, columns, data, step)


class Board:
    def log(self, values: dict[str, Any], step: int) -> None:
        self.values, self.step = values, step


ROW = {"prompt": "a | b\nc", "policy": "<b>", "reward_policy": 0.5, "outcome": "win"}


def trackers(**made: Any) -> tracking.Trackers:
    found = tracking.Trackers.__new__(tracking.Trackers)
    found.runs, found.trackers = dict.fromkeys(made, "run"), list(made.values())
    found.without_tables = set()
    return found


def test_samples_reach_trackers_as_tables():
    wandb, board = Wandb(), Board()
    trackers(wandb=wandb, tensorboard=board).log_samples([ROW] * 40, 7)
    name, columns, data, step = wandb.table
    assert (name, len(data), step) == ("eval/samples", 32, 7)
    assert dict(zip(columns, data[0], strict=True))["reward_policy"] == 0.5
    head, _, first, *_ = board.values["eval/samples"].splitlines()
    assert head.count("|") == first.count("|") == 7
    assert "| a &#124; b c | &lt;b&gt; | +0.500 |" in first


def test_a_tracker_without_tables_is_named_once_and_the_run_continues(capsys):
    made = trackers(wandb=object(), tensorboard=Board())
    made.log_samples([ROW], 1)
    made.log_samples([ROW], 2)
    assert capsys.readouterr().out.count("wandb gets no table of samples") == 1
    assert made.trackers[1].step == 2
