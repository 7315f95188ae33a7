"""Rollouts by a vLLM server: a small one that speaks its protocol, with real log-probs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastppo.cli import main
from fastppo.config.engine import TOKEN
from fastppo.errors import UserError
from fastppo.ppo import engine_start, trainer
from fastppo.ppo.engine import EngineLost
from fastppo.servers import client
from fastppo.servers.vllm import lora_rank
from tests.tiers import slow_unless
from tests.vllm_server import serving

STARTS = 3  # versions that the checks before the first step load


@pytest.fixture
def server(model_dir, monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(engine_start, "TOKENS", 4)  # of each prompt: the server keeps no cache
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(TOKEN, raising=False)
    with serving(model_dir) as made:
        yield made


@pytest.fixture
def settings(server, tmp_path) -> dict[str, Any]:
    folder = str(tmp_path / "adapters")
    return {"use_vllm": True, "vllm_server_base_url": server.url, "vllm_adapter_dir": folder}


def written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def command(config, tmp_path, **changes) -> list[str]:
    given = config(**changes).model_dump(exclude_none=True)
    (tmp_path / "run.json").write_text(json.dumps(given))
    return [str(tmp_path / "run.json")]


def test_steps_train_on_the_policy_that_the_engine_has(state, server, settings, tmp_path):
    run = state(**settings)
    asked = len(server.seen)
    for _ in range(2):
        run = trainer.step_update(run)
    for row in run.metrics.rows:
        assert row["sampler_gap_abs"] < 1e-5, "the engine's policy is the trainer's"
        assert row["rollout_is_ess"] > 0.999
        assert row["rollout_is_masked"] == 0
        assert not row["guard_sampler"]
    # The adapter as it starts is there from the checks: only the second step sends one.
    assert len(server.loaded) == STARTS + 1
    assert len(set(server.loaded)) == len(server.loaded)
    assert all(name.startswith(f"fastppo-{run.engine.run}-") for name in server.loaded)
    assert server.unloaded == server.loaded[:-1]
    assert len(set(server.folders)) == len(server.folders), "a path was used twice"
    assert [folder.exists() for folder in server.folders] == [False] * STARTS + [True]
    steps = server.seen[asked:]
    assert [body["model"] for body in steps] == [server.loaded[-2]] * 4 + [server.loaded[-1]] * 4
    assert len({body["seed"] for body in steps}) == 8
    assert {tuple(body["stop_token_ids"]) for body in steps} == {tuple(run.template.stop_ids)}
    run.engine.close()
    assert not any((tmp_path / "adapters").iterdir())


@pytest.mark.slow
def test_copies_of_a_prompt_are_different_responses(state, settings):
    run = state(num_generations=4, temperature=1.3, **settings)
    trainer.step_update(run)
    prompts = run.prompts[:1] * 4
    with run.roles.use("actor"):
        found = run.engine.complete(
            run.roles,
            prompts,
            sampling=trainer.settings(run)["sampling"],
            seeds=[1, 2, 3, 1],
        )
    assert found[0] == found[3], "the same seed"
    assert len({tuple(each.ids) for each in found}) == 3


def test_an_answer_of_another_version_is_refused(state, server, settings):
    run = trainer.step_update(state(**settings))
    server.faults.stale = "said"
    before = [p.detach().clone() for p in run.roles.trainable_parameters("actor")]
    with pytest.raises(EngineLost, match=r"answers with 'fastppo-\w+-3' where fastppo-\w+-4 was"):
        trainer.step_update(run)
    after = run.roles.trainable_parameters("actor")
    assert run.step == 1
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_an_old_version_under_the_new_name_shows(state, server, settings):
    run = trainer.step_update(state(learning_rate=1e-2, **settings))
    server.faults.stale = "hidden"
    row = trainer.step_update(run).metrics.rows[-1]
    assert row["sampler_gap_abs"] > 1e-3
    assert row["guard_sampler"] == 1


def test_a_response_ends_where_the_trainers_own_would(state, server, settings, monkeypatch):
    """An engine that has gone on beyond a stop: the rest is cut off, with its log-probs."""
    server.faults.overshoots = 2
    run = state(temperature=1.5, **settings)
    # A random policy hardly ever ends by itself: it gets a quarter of the tokens to end with.
    monkeypatch.setattr(run.template, "stop_ids", (*run.template.stop_ids, *range(100, 160)))
    with run.roles.use("actor"):
        rollout = trainer.sample(run.roles, run.prompts * 2, seed=1, **trainer.settings(run))
    assert sum(rollout.terminated) > 2
    assert len(rollout.sampler_logprob_N) == sum(rollout.response_lengths)
    for row, ended in enumerate(rollout.terminated):
        first, length = rollout.prompt_lengths[row], rollout.response_lengths[row]
        ids = rollout.input_ids_BT[row, first : first + length].tolist()
        stops = [token in run.template.stop_ids for token in ids]
        assert stops == [False] * (length - 1) + [ended]


@pytest.mark.parametrize(
    ("fault", "words"),
    slow_unless(
        lambda fault, _: fault.keys() & {"version", "no_lora_route", "raw", "key"},
        [
            ({"version": "0.9.1"}, r"is vLLM '0\.9\.1', whose answers have no token ids"),
            ({"no_lora_route": True}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 .*--max-lora-rank 8"),
            ({"raw": True}, "--logprobs-mode processed_logprobs"),
            (
                {"without_adapters": True},
                "from the trainer's log-probs in the mean, with an adapter",
            ),
            ({"other_base": True}, "in the mean, without an adapter .*--dtype float32"),
            ({"max_model_len": 20}, "has room for 20 tokens, .*start it with --max-model-len"),
            ({"key": "k"}, f"HTTP 401; set the environment variable {TOKEN} to its token"),
            ({"fails_after": 2}, "refuses .HTTP 500, 'EngineCore encountered an issue"),
        ],
    ),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_engine_that_does_not_do_is_refused_at_the_start(
    state, server, settings, tmp_path, fault, words
):
    vars(server.faults).update(fault)
    with pytest.raises(UserError, match=words) as caught:
        state(**settings)
    assert str(caught.value).startswith(f"vllm_server_base_url: {server.url}: ")
    assert not written(tmp_path / "adapters")


def test_a_refused_engine_is_one_line_and_nothing_is_written(
    config, server, settings, tmp_path, capsys
):
    server.faults.raw = True
    argv = command(config, tmp_path, **settings)
    before = set(written(tmp_path))
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastppo-train: error: vllm_server_base_url: {server.url}: its log-pro")
    assert err.count("\n") == 1
    assert set(written(tmp_path)) == before


def test_the_checks_leave_the_policy_as_it_was(state, settings):
    run = state(**settings)
    weights = {
        name: weight for name, weight in run.roles.model.named_parameters() if "lora_B" in name
    }
    assert weights
    assert not any(weight.any() for weight in weights.values())
    assert run.roles.trainable_parameters("actor")[0].requires_grad


def check_a_loss(argv, faults, fails_after, line, tmp_path, capsys, fault="fails_after"):
    """After a whole run of `argv`: one that loses its vLLM stops with `line`, then ends as it."""
    metrics = tmp_path / "metrics" / "training_metrics.csv"
    whole = metrics.read_text().splitlines()
    setattr(faults, fault, fails_after)
    out = str(tmp_path / "out2")
    capsys.readouterr()
    assert main([*argv, f"output_dir={out}"]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(
        rf"fastppo-train: stopped: {line}; "
        rf"resume_from_checkpoint: true goes on from {out}/checkpoint-1\n",
        err,
    )
    assert not written(tmp_path / "adapters")
    setattr(faults, fault, None)
    assert main([*argv, f"output_dir={out}", "resume_from_checkpoint=true"]) == 0
    resumed = metrics.read_text().splitlines()
    scores = [[line.split(",")[2] for line in rows] for rows in (whole, resumed)]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_a_server_that_is_lost_in_mid_run_leaves_a_checkpoint(
    config, server, settings, tmp_path, capsys
):
    changes = {**settings, "max_steps": 3, "save_strategy": "no", "eval_max_samples": 1}
    argv = command(config, tmp_path, **changes)
    assert main(argv) == 0
    asked = len(server.seen)
    start = asked - 3 * 4 - 2  # three steps of four, and an evaluation of two policies
    in_second_step = asked + start + 6
    line = rf"vllm_server_base_url: {server.url}: refuses .*EngineCore.*"
    check_a_loss(argv, server.faults, in_second_step, line, tmp_path, capsys)


def test_the_key_is_sent_and_is_in_no_file(config, server, settings, tmp_path, monkeypatch, capsys):
    server.faults.key = "s3cret"
    monkeypatch.setenv(TOKEN, "s3cret")
    assert main(command(config, tmp_path, **settings, max_steps=1)) == 0
    assert {each.get("Authorization") for each in server.headers} == {"Bearer s3cret"}
    said = "".join(capsys.readouterr())
    assert "s3cret" not in said
    assert not [path for path in written(tmp_path) if b"s3cret" in path.read_bytes()]


def test_the_rank_is_rounded_up_to_one_that_vllm_has():
    assert [lora_rank(rank) for rank in (1, 8, 9, 64, 65, 320)] == [8, 8, 16, 64, 128, 320]
