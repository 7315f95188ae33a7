"""The step's benchmark: who is beside whom, what a phase counts, what the table says."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import report, step, step_page
from benchmarks.peers import products, watch
from benchmarks.peers.environments import ENVIRONMENTS, LLAMAFACTORY
from fastppo import toy
from fastppo.ppo import trainer
from fastppo.rewards.reward import Reward


def test_llamafactory_meets_a_shared_critic_and_trl_one_of_its_own():
    made = [case for case in step.cases() if "upper layers" not in case.title]
    assert len(made) == 8  # 4 and 8 prompts, checkpointing on and off, two peers
    for case in made:
        theirs, ours = case.contenders
        assert ours.script == "fastppo"
        assert ours.environment is None
        assert ours.critic == theirs.critic
        assert (ours.critic == "shared") == (theirs.script == "llamafactory")
        every = {(s.batch * s.accumulation, s.checkpointing) for s in theirs.settings}
        mine = {(s.batch * s.accumulation, s.checkpointing) for s in ours.settings}
        # Beside a peer that recomputes its activations ours runs in that way, and as it comes.
        assert mine == every | {(count, None) for count, again in every if again}
    cuts = [(s.batch, s.accumulation) for s in made[0].contenders[0].settings]
    assert cuts == [(1, 4), (4, 1)]  # LLaMA-Factory samples batch by batch
    assert {s.accumulation for c in step.cases([8]) for w in c.contenders for s in w.settings} == {
        8
    }


def test_both_freeze_the_same_layers_and_lora_on_the_upper_ones_is_beside():
    made = [case for case in step.cases() if "upper layers" in case.title]
    assert len(made) == 2  # checkpointing on and off
    for case in made:
        theirs, ours, upper = case.contenders
        assert theirs.settings == ours.settings[:1]
        assert [s.checkpointing for s in ours.settings] in ([False], [True, None])
        assert {setting.finetuning for setting in ours.settings} == {"freeze"}
        assert {setting.finetuning for setting in upper.settings} == {"lora"}
        assert upper.extra == {"lora_layers": step.UPPER}


def test_a_phase_within_another_takes_its_time_away(monkeypatch, tmp_path):
    clock = iter([0.0, 0.0, 1.0, 2.0, 5.0, 7.0, 10.0, 10.0])
    monkeypatch.setattr(watch.time, "perf_counter", lambda: next(clock))
    made = watch.Watch({"steps": 1, "result": str(tmp_path / "found.json")})
    inner = SimpleNamespace(run=lambda: None)
    outer = SimpleNamespace(run=lambda: inner.run())
    made.phase(inner, "run", "backward")
    made.phase(outer, "run", "score")
    made._lap = watch.time.perf_counter()  # 0
    outer.run()  # from 1 to 7, of that 2 to 5 inside
    with pytest.raises(watch.Finished):
        made.lap()  # at 10
    assert made.steps == [
        {"total": 10.0, "generate": 0.0, "score": 3.0, "backward": 3.0, "update": 4.0}
    ]
    made.write()
    assert json.loads((tmp_path / "found.json").read_text())["steps"] == made.steps


def test_a_forward_without_gradient_is_scoring():
    assert watch.scoring() is None
    with torch.no_grad():
        assert watch.scoring() == "score"


def test_products_of_a_linear_layer_are_its_forward_and_the_gradient_of_its_input():
    made = products.Products(lambda: "now")
    frozen = torch.nn.Linear(3, 5, bias=False).requires_grad_(False)
    with made.counting():
        frozen(torch.zeros(9, 3))  # nobody asks for a gradient
        frozen(torch.zeros(9, 3, requires_grad=True)).sum().backward()
        frozen(torch.zeros(4, 3))  # as in decoding: counted by the bytes of the weights
    assert made.counts == {"now": {(9, 3, 5): 2, (9, 5, 3): 1}}
    frozen(torch.zeros(9, 3))
    assert made.counts["now"][9, 3, 5] == 2


def test_a_contender_that_is_not_float32_is_no_contender():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert watch.trainable(model, model) == 6
    with pytest.raises(AssertionError, match="bfloat16"):
        watch.trainable(model.to(torch.bfloat16))


def test_load_leaves_out_the_contenders_that_were_waited_for(monkeypatch):
    monkeypatch.setattr(report.Load, "_now", staticmethod(lambda: (10.0, 50.0)))
    times = os.times_result((0.0, 0.0, 3.0, 1.0, 0.0))
    monkeypatch.setattr(step.os, "times", lambda: times)
    assert step.OthersLoad._now() == (10.0, 46.0)


def test_a_peer_that_is_not_installed_is_a_line_with_its_cure(monkeypatch, tmp_path):
    monkeypatch.setattr(step, "FOLDER", tmp_path)
    absent = replace(LLAMAFACTORY, name="nothing")
    found = step.spawn("llamafactory", absent, {})
    assert found["status"] == "absent"
    assert "python -m benchmarks.peers.environments nothing" in found["note"]


def test_environments_are_pinned_and_ignored_by_git():
    for made in ENVIRONMENTS.values():
        if not made.on_ours:
            assert "torch==2.13.0" in made.requirements
            assert any(name.startswith("transformers==") for name in made.requirements)
        assert made.folder.name == f".{made.name}"
    assert "benchmarks/peers/.*/" in (step.PEERS.parents[1] / ".gitignore").read_text()


def timed(total, **more):
    phases = {"generate": 1.0, "score": 2.0, "update": 3.0, "backward": 4.0}
    steps = [{"total": total + extra, **phases} for extra in (0.5, 0.0, -0.5)]
    found = {"status": "timed", "steps": steps, "peak_gib": 1.5, "response_tokens": 256, **more}
    return step.summary(found, 256)


def test_the_table_has_times_against_ours_and_says_what_failed():
    row = {"case": "a case", "setting": "batch 1 x accumulation 4"}
    found = {
        "date": "2026-01-01",
        "command": "python -m benchmarks step",
        "machine": {"cpu": "x", "cores": 2, "memory_gib": 1, "torch": "2", "threads": 2},
        "notes": ["a note"],
        "rows": [
            {**row, "what": "theirs", "ours": False, **timed(45.0)},
            {**row, "what": "broken", "ours": False, "status": "failed", "note": "a | b"},
            {**row, "what": "short", "ours": False, **timed(9.0, response_tokens=255)},
            {**row, "what": "ours", "ours": True, **timed(15.0)},
            {**row, "what": "ours", "ours": True, **timed(10.0)}
            | {"setting": "batch 1 x accumulation 4, as it comes"},
        ],
    }
    text = step_page.markdown(found)
    cut = "batch 1 x accumulation 4"
    assert (
        f"| theirs | {cut} | 45.0 | 44.5 to 45.5 | 1.0 | 2.0 | 3.0 | 4.0 | 1.50 | 3.00 | 4.50 |"
        in text
    )
    assert f"| ours | {cut} | 15.0 | 14.5 to 15.5 | 1.0 | 2.0 | 3.0 | 4.0 | 1.50 |  |  |" in text
    assert "failed: a \\| b" in text
    assert "wrong: 255 response tokens in place of 256" in text
    assert "- a note" in text
    assert "matrix products" not in text


def test_the_share_of_the_products_is_of_the_median_steps_phases():
    alone = {"generate": 0.5, "score": 1.0, "update": 2.0, "backward": 3.0}
    rates = {"gflops": 150.0, "gb_per_second": 20.0}
    row = {"what": "ours", "setting": "batch 1", **timed(15.0, products={**alone, **rates})}
    text = step_page.share(row)
    assert "take, ours, batch 1: decoding" in text
    assert "decoding and prompts 50% of 1.0 s, scoring 50% of 2.0 s, update 71% of 7.0 s" in text
    assert "150 GFLOP/s" in text


def test_the_command_runs_what_was_asked_for_and_adds_to_what_is_there(
    monkeypatch, tmp_path, capsys
):
    asked = []

    def rows(wanted, model, load, changes, ours):
        asked.append(([case.title for case in wanted], changes))
        for case in wanted:
            yield {"case": case.title, "what": "x", "ours": True, "setting": "s", **timed(1.0)}

    monkeypatch.setattr(step, "rows", rows)
    out = tmp_path / "step.json"
    base = ["step", "--quick", "--out", str(out), "--prompts", "4", "--checkpointing", "on"]
    assert command.main([*base, "--peer", "trl"]) == 0
    assert command.main([*base, "--peer", "llamafactory", "--add"]) == 0
    assert asked[0][1] == {"steps": 1, "new_tokens": 4, "epochs": 1, "products": True}
    titles = [row["case"] for row in json.loads(out.read_text())["rows"]]
    assert titles == [*asked[0][0], *asked[1][0]]
    assert (
        len(set(titles)) == len(titles) == 3
    )  # against LLaMA-Factory: all layers, and the upper ones
    assert "no measurement" in capsys.readouterr().out
    assert out.with_suffix(".md").is_file()
    assert command.main([*base, "--peer", "trl", "--ours", "--add"]) == 0
    again = [row["case"] for row in json.loads(out.read_text())["rows"]]
    assert sorted(again) == sorted(
        titles
    )  # a row that is measured again takes the place of the old one


@pytest.fixture
def toy_settings(tmp_path):
    """Settings of our own contender's script: two steps of a toy model."""
    toy.write_model(tmp_path / "model")
    (tmp_path / "dataset_info.json").write_text('{"prompts": {"file_name": "prompts.json"}}')
    (tmp_path / "prompts.json").write_text(json.dumps([{"instruction": "x"}] * 2))
    return {
        "model": str(tmp_path / "model"),
        "reward": "fastppo.toy:vowels",
        "dataset": "prompts",
        "dataset_dir": str(tmp_path),
        "template": "chatml",
        "folder": str(tmp_path),
        "result": str(tmp_path / "result.json"),
        "extra": {"reward_model_type": "function"},
        **{"batch": 1, "accumulation": 2, "rank": 2, "critic": "shared", "checkpointing": True},
        **{"epochs": 2, "new_tokens": 4, "steps": 2, "learning_rate": 1e-5, "seed": 1},
    }


def check_timed(found):
    """Every token was sampled, and the second step has time in every phase."""
    assert found["response_tokens"] == 8
    assert len(found["steps"]) == 2
    assert all(found["steps"][1][phase] > 0 for phase in ("total", *step_page.PHASES))


def test_our_own_contender_runs_to_its_end_with_time_in_every_phase(toy_settings, monkeypatch):
    """Its script names functions of the trainer; here in this process, which has imported them."""
    monkeypatch.setitem(sys.modules, "watch", watch)
    monkeypatch.setitem(sys.modules, "products", products)
    script = runpy.run_path(str(step.PEERS / "run_fastppo.py"))
    # What `Watch.phase` replaces is put back after the test.
    for owner, name in ((trainer, "sample"), (trainer, "score"), (Reward, "__call__")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(torch.Tensor, "backward", torch.Tensor.backward)
    settings = Path(toy_settings["folder"]) / "settings.json"
    settings.write_text(json.dumps({**toy_settings, "products": True}))
    monkeypatch.setattr(sys, "argv", ["run_fastppo.py", str(settings)])
    watch.main(script["run"])
    found = json.loads(Path(toy_settings["result"]).read_text())
    check_timed(found)
    assert all(found["products"][name] > 0 for name in ("generate", "score", "update", "backward"))


@pytest.mark.slow  # imports everything again
def test_so_it_does_as_the_benchmark_starts_it(toy_settings, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(toy_settings))
    done = subprocess.run(
        [sys.executable, step.PEERS / "run_fastppo.py", tmp_path / "settings.json"],
        env={**os.environ, "PYTHONPATH": str(step.PEERS.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check_timed(json.loads((tmp_path / "result.json").read_text()))
