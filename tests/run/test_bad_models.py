"""What only a model, a server or somebody's module shows wrong: still exit code 2, nothing written.

The cases are in tests/bad; each runs as a command in a project with tiny models. The fast tier has
every third of them: a command that loads a model takes as long as ten that do not.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from fastppo.cli import main
from fastppo.rewards.server import TOKEN
from fastppo.servers import client
from tests.bad import HEAVY, Case, cases, put
from tests.reward_server import Reply, serving
from tests.tiers import slow_unless

PPO = {
    "stage": "ppo",
    "model_name_or_path": "./model",
    "reward_model": "reward",
    "dataset": "data/prompts.json",
    "template": "chatml",
    "output_dir": "out",
    "metrics_dir": "metrics",
    "max_steps": 1,
    "max_new_tokens": 4,
}
API = {"reward_model_type": "api", "reward_api_retries": 1, "reward_api_timeout": 5.0}


class Evil:
    """A pickle that leaves a file behind where it is opened without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.fixture
def project(tmp_path, monkeypatch, model_dir, reward_dir) -> Path:
    """The working directory: a tiny model, a reward model for it, four prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(TOKEN, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    shutil.copytree(model_dir, tmp_path / "model")
    shutil.copytree(reward_dir, tmp_path / "reward")
    put(tmp_path / "data/prompts.json", [{"instruction": f"Say {i}"} for i in range(4)])
    yield tmp_path
    sys.modules.pop("mine", None)


def spoil(case: Case, project: Path, url: str) -> list[str]:
    """Spoil the project, and give the command line."""
    good = {**PPO, **API, "reward_model": url} if case.area == "endpoints" else PPO
    argv = case.spoil(project, good)
    for path in case.pickles:
        torch.save({"v_head.summary.weight": Evil(project / "owned")}, project / path)
    for path, shapes in case.tensors.items():
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
        save = save_file if path.endswith(".safetensors") else torch.save
        save(tensors, project / path)
    return argv


def reply(body: Any = None, **others: Any) -> Reply:
    """A server's answer as the table has it."""
    if isinstance(body, dict):
        body = body["repeat"] * body["times"]
    return Reply(body.encode() if isinstance(body, str) else body, **others)


def files(project: Path) -> set[Path]:
    """All that lies there; compiled modules are Python's."""
    return {path for path in project.rglob("*") if "__pycache__" not in path.parts}


TABLE = cases(*HEAVY)


@pytest.mark.parametrize(
    "case",
    slow_unless(TABLE[::3].__contains__, TABLE),
    ids=lambda case: f"{case.area}-{case.wrong}",
)
def test_bad_models_servers_and_functions(project, capsys, case: Case):
    with serving() as server:
        server.script = [reply(**answer) for answer in case.answers]
        argv = spoil(case, project, server.url)
        before = files(project)
        code = case.run(argv)
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    assert err.count("\n") == 1
    line = err.removeprefix(f"{case.command}: error: ").rstrip("\n")
    assert case.is_said(line), line
    assert files(project) == before


def test_a_pickle_is_opened_nowhere(project):
    """The file that the table's pickles would leave behind is what an unsafe reader leaves."""
    torch.save({"x": Evil(project / "owned")}, project / "x.bin")
    torch.load(project / "x.bin", weights_only=False)["x"].close()
    assert (project / "owned").exists()
    refused = [case for case in cases("models") if case.pickles]
    assert {path for case in refused for path in case.pickles} == {
        "model/pytorch_model.bin",
        "reward/value_head.bin",
        "reward/adapter_model.bin",
    }


def test_code_that_comes_with_a_model_is_not_run_unasked(project, capsys, monkeypatch):
    """And where it is asked for, it is: the refusal is not for want of a file."""
    code = (
        "open('owned', 'w').close()\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
        "class MineConfig(C):\n    model_type = 'mine'\n"
        "class Mine(M):\n    config_class = MineConfig\n"
    )
    put(project / "model/modeling_mine.py", code)
    path = project / "model/config.json"
    names = {"AutoConfig": "MineConfig", "AutoModelForCausalLM": "Mine"}
    auto_map = {kind: f"modeling_mine.{name}" for kind, name in names.items()}
    put(path, {**json.loads(path.read_text()), "model_type": "mine", "auto_map": auto_map})
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(project / "modules")
    )
    put(project / "run.yaml", {**PPO})
    assert main(["run.yaml"]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not (project / "owned").exists()
    main(["run.yaml", "trust_remote_code=true"])
    assert (project / "owned").exists()


def test_an_endless_answer_is_cut_off(project, capsys):
    """Of an answer of 16 MiB little more than the first is taken off the wire."""
    with serving() as server:
        server.script = [Reply(b" " * (16 << 20))]
        put(project / "run.yaml", {**PPO, **API, "reward_model": server.url})
        assert main(["run.yaml"]) == 2
        assert server.sent < 12 << 20
    assert "its answer is over" in capsys.readouterr().err


def test_no_file_of_a_run_holds_a_secret(project, capsys, monkeypatch):
    """Neither the token of a server nor what stands behind `?` in its URL."""
    monkeypatch.setenv(TOKEN, "t0ken-s3cret")
    with serving() as server:
        url = f"{server.url}?key=qu3ry-s3cret"
        put(project / "run.yaml", {**PPO, **API, "reward_model": url})
        tracker = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
        kept = ["save_steps=1", "max_steps=2", "eval_strategy=steps", "eval_steps=1"]
        assert main(["run.yaml", *kept, f"report_to={tracker}"]) == 0
        assert all(x["Authorization"] == "Bearer t0ken-s3cret" for x in server.headers)
    out, err = capsys.readouterr()
    assert "s3cret" not in out + err
    written = [path for path in files(project) if path.is_file() and path.name != "run.yaml"]
    assert project / "metrics/summary.json" in written
    assert not [path for path in written if b"s3cret" in path.read_bytes()]
