"""PPO steps whose responses a real vLLM samples on this machine's CPU: a server, and beside us."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.peers.environments import VLLM
from benchmarks.peers.vllm_server import STARTS_IN, serving
from fastppo import toy
from fastppo.ppo import trainer
from fastppo.ppo.engine_start import Comparison
from fastppo.ppo.state import State, init_state
from fastppo.servers.vllm import VLLMServer
from tests.tiny import stir

pytestmark = pytest.mark.peers

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 32  # tokens of a block of its cache


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads are as wide as vLLM's kernels for CPUs want them."""
    folder = tmp_path_factory.mktemp("vllm") / "model"
    toy.write_model(folder, hidden_size=128)
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[str]:
    """The address of a server of this model."""
    assert VLLM.python.exists(), "make test-peers installs it"
    flags = ["--block-size", str(BLOCK), "--enable-prefix-caching"]
    with serving(model, model.parent / "log", rank=8, length=256, flags=flags) as url:
        yield url


@pytest.fixture
def run(server: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    """The toy's run on this model, with rollouts by the server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    config = toy.config(
        tmp_path,
        model_name_or_path=str(model),
        metrics_dir=str(tmp_path / "metrics"),
        per_device_train_batch_size=8,
        use_vllm=True,
        vllm_server_base_url=server,
        vllm_adapter_dir=str(tmp_path / "adapters"),
    )
    made = init_state(config)
    assert made.engine is not None
    return made


def test_steps_by_a_real_server(run):
    for _ in range(4):
        run = trainer.step_update(run)
    for row in run.metrics.rows:
        assert row["sampler_gap_abs"] < 1e-3
        assert row["rollout_is_ess"] > 0.99
        assert not row["guard_sampler"]
    assert run.engine.sent == 6, "three versions at the start, and one for each later step"
    folders = list(run.engine.folder.iterdir())
    assert [folder.name for folder in folders] == [run.engine.current.name]
    run.engine.close()
    assert not run.engine.folder.exists()


def test_no_keys_of_an_earlier_policy_are_reused(run):
    """A prompt of more than two blocks of the cache, which the server has kept."""
    prompt = max(run.prompts, key=lambda each: len(each.ids))
    copies = 1 + 3 * BLOCK // len(prompt.ids)
    long = type(prompt)(prompt.ids * copies, prompt.text)
    assert len(long.ids) > 2 * BLOCK
    compared = Comparison(run.engine, run.roles, [long], run.template, run.tokenizer)
    with run.roles.use("actor"), torch.no_grad():
        stir(run.roles.trainable_parameters("actor"), 3)
        first = compared.sample()
        again = compared.sample()
        before_N = compared.logprobs(first)
        stir(run.roles.trainable_parameters("actor"), 4)
        moved = compared.sample()
        assert compared.gap(moved) < 1e-3, "as the trainer has it after the adapter moved"
        assert (compared.logprobs(first) - before_N).abs().mean() > 0.1, "it moved by far"
    torch.testing.assert_close(first.sampler_logprob_N, before_N, atol=5e-3, rtol=0)
    assert first.input_ids_BT.tolist() == again.input_ids_BT.tolist(), "a seed repeats"
    run.engine.close()


def test_what_the_server_says_of_an_adapter_that_is_not_there(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(Exception, match="set vllm_adapter_dir to a folder that"):
        VLLMServer(server, timeout=60).load("fastppo-x-1", Path("/nowhere/at/all"))


def test_steps_with_vllm_beside_the_trainer(tmp_path):
    """In the environment that has both: two steps, and an adapter that moves by far."""
    assert VLLM.python.exists(), "make test-peers installs it"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [VLLM.python, "-m", "tests.peers.colocated", tmp_path]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=STARTS_IN
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "by vLLM 0.32.0 beside the trainer (experimental), whose log-probs are" in found["words"]
    for row in found["rows"]:
        assert row["sampler_gap_abs"] < 1e-3
        assert row["rollout_is_ess"] > 0.99
        assert not row["guard_sampler"]
    # Three at the start, the second step's, what that has trained, and the one that moved.
    assert found["sent"] == 6
    assert found["repeats"], "a seed repeats"
    assert found["moved_by"] > 0.1, "the adapter moved by far"
    assert found["moved_gap"] < 1e-3, "and vLLM with it"
    assert len(set(found["threads"])) == 1, "vLLM's threads are its own processes'"
    assert not found["process_group"]
    assert not found["left"]
