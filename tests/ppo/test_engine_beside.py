"""Rollouts by vLLM beside the trainer: a small package in its place, with real log-probs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastppo.cli import main
from fastppo.errors import UserError
from fastppo.ppo import engine_start, trainer
from fastppo.ppo.engine import EngineLost
from fastppo.servers import in_process
from tests.ppo.test_engine import STARTS, check_a_loss, command, written
from tests.vllm_module import Package, install

SETTINGS = {"use_vllm": True, "vllm_mode": "colocate"}


@pytest.fixture
def vllm(model_dir, monkeypatch) -> Package:
    monkeypatch.setattr(engine_start, "TOKENS", 4)  # of each prompt: the package keeps no cache
    return install(model_dir, monkeypatch)


@pytest.fixture
def settings(vllm, tmp_path) -> dict[str, Any]:
    return {**SETTINGS, "vllm_adapter_dir": str(tmp_path / "adapters")}


def test_steps_train_on_the_policy_that_vllm_has(state, vllm, settings, tmp_path):
    run = state(vllm_gpu_memory_utilization=0.4, **settings)
    assert vllm.arguments["enable_lora"]
    assert vllm.arguments["logprobs_mode"] == "processed_logprobs"
    assert vllm.arguments["gpu_memory_utilization"] == 0.4
    assert vllm.arguments["max_lora_rank"] == 8
    assert vllm.arguments["dtype"] == "float32"
    longest = max(len(prompt.ids) for prompt in run.prompts)
    assert vllm.arguments["max_model_len"] == longest + run.config.max_new_tokens
    for _ in range(2):
        run = trainer.step_update(run)
    for row in run.metrics.rows:
        assert row["sampler_gap_abs"] < 1e-5, "vLLM's policy is the trainer's"
        assert row["rollout_is_ess"] > 0.999
    assert len(vllm.loaded) == STARTS + 1
    assert vllm.unloaded == vllm.loaded[:-1]
    assert len(set(vllm.folders)) == len(vllm.folders), "a path was used twice"
    assert [folder.exists() for folder in vllm.folders] == [False] * STARTS + [True]
    assert not any(isinstance(event, tuple) for event in vllm.events), "it is not asked to sleep"
    run.engine.close()
    assert vllm.shut
    assert not any((tmp_path / "adapters").iterdir())


def test_an_answer_of_another_version_is_refused(state, vllm, settings):
    run = trainer.step_update(state(**settings))
    vllm.faults.stale = "said"
    before = [p.detach().clone() for p in run.roles.trainable_parameters("actor")]
    with pytest.raises(EngineLost, match=r"answers with fastppo-\w+-3 where fastppo-\w+-4 was"):
        trainer.step_update(run)
    after = run.roles.trainable_parameters("actor")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_it_sleeps_between_rollouts_and_is_compared_after_its_first_waking(
    state, vllm, settings, monkeypatch
):
    monkeypatch.setattr("fastppo.ppo.state.check_colocated", lambda *_: None)  # as on a GPU
    run = state(vllm_enable_sleep_mode=True, **settings)
    assert vllm.asleep, "it sleeps until the first rollout"
    slept = vllm.events.index(("sleep", 1))
    assert vllm.events[slept : slept + 3] == [("sleep", 1), "wake", "generate"]
    started = len(vllm.events)
    for _ in range(2):
        run = trainer.step_update(run)
        assert vllm.asleep
    assert vllm.events[started:] == ["wake", "generate", ("sleep", 1)] * 2
    assert {event for event in vllm.events if isinstance(event, tuple)} == {("sleep", 1)}
    assert run.metrics.rows[-1]["sampler_gap_abs"] < 1e-5


def test_weights_that_were_not_restored_are_seen_before_the_first_step(
    state, vllm, settings, monkeypatch, tmp_path
):
    monkeypatch.setattr("fastppo.ppo.state.check_colocated", lambda *_: None)
    vllm.faults.forgets = True
    with pytest.raises(UserError, match=r"after its first waking .*memory was not restored"):
        state(vllm_enable_sleep_mode=True, **settings)
    assert vllm.shut
    assert not written(tmp_path / "adapters")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"other_base": True}, "in the mean, without an adapter .*vllm_mode: server"),
        ({"without_adapters": True}, "in the mean, with an adapter .*vllm_mode: server"),
        ({"raw": True}, "are those before temperature"),
        ({"fails_after": 1}, r"failed \(EngineDeadError: EngineCore encountered an issue\.\); its"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_vllm_that_does_not_do_is_refused_at_the_start(state, vllm, settings, fault, words):
    vars(vllm.faults).update(fault)
    with pytest.raises(UserError, match=words) as caught:
        state(**settings)
    assert str(caught.value).startswith("vllm_mode: colocate: ")
    assert vllm.shut


@pytest.mark.parametrize(
    ("vllm_version", "transformers_version", "words"),
    [
        (None, "5.19.0", "is not installed here; run: pip install --constraint constraints-vllm"),
        ("0.11.2", "5.19.0", r"vLLM 0\.11\.2 is here, and 0\.32 or newer is needed"),
        ("0.32.0", "5.23.0", r"runs with transformers <5\.20\.0,>=5\.16\.1, and here is 5\.23\.0"),
        ("0.32.0", "5.2.0", r"and here is 5\.2\.0; run: pip install --constraint"),
    ],
)
def test_versions_are_checked_before_anything_is_loaded(
    config, vllm, monkeypatch, vllm_version, transformers_version, words
):
    requires = ["transformers<5.20.0,>=5.16.1", "numpy"]
    found = vllm_version and SimpleNamespace(version=vllm_version, requires=requires)
    monkeypatch.setattr(in_process, "installed", lambda: found)
    monkeypatch.setattr(in_process, "version", lambda _: transformers_version)
    with pytest.raises(UserError, match=words) as caught:
        in_process.check_colocated(config(**SETTINGS), "cpu")
    assert str(caught.value).endswith("or use vllm_mode: server")
    assert not vllm.arguments, "it was not started"


def test_children_get_vllms_variables_and_the_run_keeps_its_own(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    before = dict(os.environ)
    with in_process.child_processes():
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG", "the user's own"
        assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
        os.environ["LD_PRELOAD"] = "libgomp.so"  # as vLLM does
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert dict(os.environ) == before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.fixture
def children(vllm, monkeypatch):
    """Processes that vLLM has started, one each time that it starts."""
    started = []

    def start(**arguments):
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600.0,))
        child.start()
        started.append(child)
        return vllm.start(**arguments)

    monkeypatch.setattr(sys.modules["vllm"], "LLM", start)
    return started


def test_a_vllm_that_does_not_start_in_time_ends_the_run(
    config, vllm, children, settings, monkeypatch, tmp_path, capsys
):
    """With one line, before anything is written; its processes are killed."""
    monkeypatch.setattr(in_process, "STARTS_IN", 0.5)
    vllm.faults.hangs = "start"
    assert main(command(config, tmp_path, vllm_server_timeout=0.1, **settings)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    line = "vllm_mode: colocate: vLLM has not started in 0.5 s; raise vllm_server_timeout, or use "
    assert said.endswith(f"{line}vllm_mode: server")
    assert not children[0].is_alive()
    assert not written(tmp_path / "adapters")
    vllm.released.set()


def test_a_larger_timeout_is_also_the_time_to_start(state, vllm, settings, monkeypatch):
    monkeypatch.setattr(in_process, "STARTS_IN", 0.01)
    quick = vllm.start

    def start(**arguments):
        time.sleep(0.2)
        return quick(**arguments)

    monkeypatch.setattr(sys.modules["vllm"], "LLM", start)
    state(vllm_server_timeout=60.0, **settings).engine.close()


@pytest.mark.parametrize("call", ["generate", "add_lora"])
def test_a_vllm_that_hangs_does_not_hang_the_run(state, vllm, settings, call):
    run = trainer.step_update(state(**settings))
    before = [p.detach().clone() for p in run.roles.trainable_parameters("actor")]
    run.engine.server.timeout, vllm.faults.hangs = 0.2, call
    line = r"^vllm_mode: colocate: vLLM has not answered in 0\.2 s; raise vllm_server_timeout, or "
    for _ in range(2):  # and it is not waited for again
        with pytest.raises(EngineLost, match=line):
            trainer.step_update(run)
        run.engine.server.timeout = 3600.0
    after = run.roles.trainable_parameters("actor")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    run.engine.close()
    assert vllm.shut


def test_a_rollout_has_the_time_of_each_batch_of_requests(state, vllm, settings, monkeypatch):
    """As 256 requests to a server have it, all of which begin together."""
    monkeypatch.setattr(in_process, "MOST_REQUESTS", 2)
    run = state(**settings)
    run.engine.server.timeout, vllm.faults.hangs = 0.1, "generate"
    with pytest.raises(EngineLost, match=r"has not answered in 0\.2 s"):
        trainer.step_update(run)  # of four responses
    run.engine.close()


def test_a_vllm_that_does_not_end_is_killed(state, vllm, children, settings, monkeypatch):
    monkeypatch.setattr(in_process, "ENDS_IN", 0.1)
    monkeypatch.setattr(vllm, "shutdown", lambda timeout: vllm.released.wait())
    run = state(**settings)
    assert children[0].is_alive()
    run.engine.close()
    vllm.released.set()
    assert not children[0].is_alive()
    assert children[0] not in multiprocessing.active_children()


def lost_in_mid_run(config, vllm, settings, tmp_path, capsys, line, fault, **changes):
    """The second step's rollout fails: a checkpoint of the first, and on from there."""
    few = {"max_steps": 3, "save_strategy": "no", "eval_max_samples": 1}
    argv = command(config, tmp_path, **settings, **few, **changes)
    assert main(argv) == 0
    calls = vllm.events.count("generate")
    start = calls - 3 - 2  # three steps, and an evaluation of two policies
    in_second_step = calls + start + 1
    check_a_loss(argv, vllm.faults, in_second_step, line, tmp_path, capsys, fault)


@pytest.mark.slow
def test_a_vllm_that_is_lost_in_mid_run_leaves_a_checkpoint(
    config, vllm, settings, tmp_path, capsys
):
    line = r"vllm_mode: colocate: vLLM failed \(EngineDeadError: .*use vllm_mode: server"
    lost_in_mid_run(config, vllm, settings, tmp_path, capsys, line, "fails_after")


@pytest.mark.slow
def test_a_vllm_that_hangs_in_mid_run_leaves_a_checkpoint(config, vllm, settings, tmp_path, capsys):
    line = (
        r"vllm_mode: colocate: vLLM has not answered in 10 s; raise vllm_server_timeout, or use "
        "vllm_mode: server"
    )
    changes = {"vllm_server_timeout": 10.0}
    lost_in_mid_run(config, vllm, settings, tmp_path, capsys, line, "hangs_after", **changes)
