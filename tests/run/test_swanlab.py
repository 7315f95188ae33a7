"""SwanLab, which need not be installed: what its `init` is given, and what it is sent."""

from __future__ import annotations

import os
import re
import sys
import types
from typing import Any, ClassVar

import pytest
from accelerate import tracking as accelerate_tracking

from fastppo.config import config_from_dict
from fastppo.errors import UserError
from fastppo.run import preflight
from fastppo.run.tracking import Trackers, settings
from tests.project import PPO


class SwanLab:
    """What accelerate's class for it does, noted; `run.log` is where its values go."""

    made: ClassVar[list[SwanLab]] = []
    requires_logging_directory = False

    def __init__(self, project: str, **named: Any) -> None:
        self.project, self.named, self.rows = project, named, []
        self.made.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append((step, values))


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(SwanLab, "made", [])
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "swanlab", SwanLab)
    monkeypatch.setattr(preflight, "check_packages", lambda config: None)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return SwanLab.made


def test_use_swanlab_is_swanlab_in_report_to():
    assert config_from_dict({**PPO, "use_swanlab": True}).trackers == ("swanlab",)
    both = {"use_swanlab": True, "report_to": "tensorboard,swanlab"}
    assert config_from_dict({**PPO, **both}).trackers == ("tensorboard", "swanlab")
    assert config_from_dict({**PPO, "swanlab_project": "mine"}).trackers == ()


def test_a_run_has_its_project_name_workspace_and_folder(config, made, tmp_path):
    Trackers(config(report_to="swanlab"))
    named = made[0].named
    assert made[0].project == "fastppo"
    assert re.fullmatch(r"[a-z0-9]{21}", named["id"])  # its earlier releases take no other
    assert named == {"name": str(tmp_path / "out"), "id": named["id"], "resume": "allow"}
    Trackers(
        config(
            use_swanlab=True,
            project="all",
            run_name="one",
            swanlab_project="rl",
            swanlab_workspace="lab",
            swanlab_run_name="two",
            swanlab_logdir="logs",
            swanlab_mode="local",
        )
    )
    assert (made[1].project, made[1].named) == (
        "rl",
        {"name": "two", "workspace": "lab", "logdir": "logs", "mode": "local"},
    )
    Trackers(config(use_swanlab=True, project="all", run_name="one"))
    assert (made[2].project, made[2].named["name"]) == ("all", "one")
    assert made[2].named["id"] != named["id"]


def test_its_local_mode_asks_for_swanboard_before_the_run(config, monkeypatch):
    """SwanLab 0.10.3 without it prints an ImportError, goes on, and there is no run to look at."""
    installed = {"swanlab"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in installed or None)
    settings = config(use_swanlab=True, swanlab_mode="local")
    with pytest.raises(UserError, match=r"local needs swanboard.* pip install 'swanlab\[dashb"):
        preflight.check_packages(settings)
    preflight.check_packages(config(use_swanlab=True))
    installed.add("swanboard")
    preflight.check_packages(settings)


def test_a_resumed_run_goes_on_under_its_id(config, made):
    first = Trackers(config(use_swanlab=True))
    again = Trackers(config(use_swanlab=True), first.runs, 3)
    assert made[1].named["id"] == made[0].named["id"]
    assert made[1].named["resume"] == "allow"
    assert again.runs == first.runs


def test_swanlab_api_key_is_where_it_looks_and_nowhere_else(config, made, monkeypatch):
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    preflight.check(config(swanlab_api_key="s3cret"))
    assert "SWANLAB_API_KEY" not in os.environ  # nothing reports to it
    preflight.check(config(swanlab_api_key="s3cret", use_swanlab=True))
    assert os.environ["SWANLAB_API_KEY"] == "s3cret"
    Trackers(config(swanlab_api_key="s3cret", use_swanlab=True))
    assert "s3cret" not in str([settings(config(swanlab_api_key="s3cret")), vars(made[0])])


def test_samples_are_a_table_in_its_text(config, made, monkeypatch):
    stand_in = types.ModuleType("swanlab")
    stand_in.Text = lambda text: ("text", text)
    monkeypatch.setitem(sys.modules, "swanlab", stand_in)
    trackers = Trackers(config(use_swanlab=True))
    trackers.log({"score": 0.5, "stopped": True}, 2)
    trackers.log_samples([{"prompt": "a | b", "policy": "yes", "reward_policy": 0.5}], 2)
    (_, row), (step, table) = made[0].rows
    assert row == {"score": 0.5}
    kind, text = table["eval/samples"]
    assert (step, kind) == (2, "text")
    assert "| a &#124; b | yes | +0.500 |" in text
