"""A base that is sharded over two processes (FSDP2 on gloo): the run without it, to rounding."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastppo import toy
from fastppo.models.build import build
from fastppo.ppo import update
from fastppo.run import durable, save
from tests import world as processes
from tests.limits import HANGS
from tests.ppo.sharding_cases import CASES, LAYERS, OTHER_LAYERS, runs_of
from tests.ppo.test_parallel import close
from tests.reliability import runs
from tests.reliability.test_signals import lines, wait_for
from tests.tiny import make_config, stir

SHARDED = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each process has of a run alone, of two without sharding, and of two with it."""
    folder = tmp_path_factory.mktemp("sharded")
    toy.write_model(folder / "model", layers=LAYERS)
    toy.write_model(folder / "other", seed=5, layers=OTHER_LAYERS)
    toy_reward(folder)
    every = list(CASES)
    results = {}
    for world, size, names, changes in (
        ("alone", 1, every, {}),
        ("whole", 2, every[:1], {}),
        ("sharded", 2, every, SHARDED),
    ):
        results[world] = processes.results(
            runs_of, size, folder / world, folder, names, changes, seconds=HANGS
        )
    return results


def toy_reward(folder: Path) -> None:
    """A reward adapter on the model of LAYERS layers, with random weights."""
    made = build(make_config(folder / "model", folder), torch.device("cpu"))
    stir(made.trainable_parameters("actor"), 1)
    stir(list(made.critic_head.parameters()), 2, 1.0)
    save.save_model(made.model, made.critic_head, toy.byte_tokenizer(), folder / "reward")
    record = {"score_at": "eos", "template": "chatml", "fastppo": "test"}
    (folder / "reward" / "fastppo_reward.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("name", "other"), [*((name, "alone") for name in CASES), ("gae", "whole")]
)
def test_a_sharded_run_is_the_run_without_to_rounding(found, name, other):
    wanted = found[other][0][name]
    assert len({len(text) for texts in wanted["texts"] for text in texts}) > 2, "ragged"
    for process in found["sharded"]:
        got = process[name]
        assert got["texts"] == wanted["texts"]
        close(got["parameters"], wanted["parameters"], 2e-5, "parameters")
        for row, one in zip(got["rows"], wanted["rows"], strict=True):
            for key, value in one.items():
                assert row[key] == pytest.approx(value, rel=1e-3, abs=2e-5), key
        for when in ("before", "after"):
            assert got[when]["texts"] == wanted[when]["texts"]
            close(got[when], wanted[when], 1e-4, when)


@pytest.mark.parametrize("name", CASES)
def test_processes_hold_the_same_adapters_to_the_bit(found, name):
    first, second = (process[name]["parameters"] for process in found["sharded"])
    assert all((one == other).all() for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_layers_are_whole_while_they_run_and_sharded_again_after(found, name):
    for process in found["sharded"]:
        looked = process[name]["sharded"]
        assert looked.keys() == {
            "sample",
            "score",
            "forward_backward",
            "update",
            "make_rollout",
        }
        assert all(all(each) for each in looked.values()), looked
        assert process[name]["whole inside"]
    assert not any(any(each) for each in found["alone"][0][name]["sharded"].values())


@pytest.mark.parametrize("name", CASES)
def test_a_process_holds_half_of_the_layers_and_all_else(found, name):
    for process in found["sharded"]:
        layers, everything = process[name]["layers and all"]
        held, after = process[name]["bytes"]
        assert held == after == everything - layers // 2
    layers, everything = found["alone"][0][name]["layers and all"]
    assert found["alone"][0][name]["bytes"] == (everything, everything)


def test_the_first_lines_say_what_each_holds_and_that_it_is_experimental(found):
    (line,) = [x for x in found["sharded"][0]["gae"]["notes"] if x.startswith("fsdp")]
    held, _ = found["sharded"][0]["gae"]["bytes"]
    assert "experimental" in line
    assert f"each of 2 processes holds {held:,};" in line
    assert not any("fsdp" in x for x in found["whole"][0]["gae"]["notes"])


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """The command's settings, for a run whose layers can be sharded."""
    own = {"reward_model": "fastppo.toy:vowels", "eval_judge": "fastppo.toy:vowels"}
    own |= {"lr_scheduler_type": "constant", "ddp_timeout": 60, "use_cpu": True}
    return runs.ppo(folder, **own, **changes)


def test_a_run_of_one_process_goes_on_sharded_and_alone_again(tmp_path):
    short = {"save_steps": 1, "eval_strategy": "no", "max_new_tokens": 4}
    unbroken = settings(tmp_path / "unbroken", max_steps=3, **short)
    assert runs.run(unbroken)[0] == 0
    mine = settings(tmp_path / "mine", max_steps=3, **short)
    assert runs.run({**mine, "max_steps": 1})[0] == 0
    resumed = {**mine, "resume_from_checkpoint": True}
    codes, said = processes.run({**resumed, **SHARDED, "max_steps": 2}, 2)
    assert codes == [0, 0], said
    assert "fsdp is experimental" in said
    code, said = runs.run({**resumed, **SHARDED})  # one process, which has the base whole
    assert code == 0, said
    assert "fsdp: one process has nobody to share the base with" in " ".join(said.split())
    one, other = (
        load_file(Path(each["output_dir"]) / "adapter_model.safetensors")
        for each in (unbroken, mine)
    )
    assert one.keys() == other.keys()
    close(other, one, 1e-4)


def out_of_memory(rank: int) -> None:
    """In the update of process 1 memory runs out."""
    inner = update.forward_backward

    def forward_backward(*args: Any, **kwargs: Any) -> Any:
        if rank == 1:
            raise MemoryError
        return inner(*args, **kwargs)

    update.forward_backward = forward_backward


def test_memory_that_runs_out_in_one_process_ends_all_with_a_line_each(tmp_path):
    codes, said = processes.run(settings(tmp_path / "run", **SHARDED), 2, out_of_memory)
    assert codes == [1, 1], said
    assert "out of memory in update, which no process can try again while others wait" in said
    assert "the smallest changes that help" in said or "no setting makes it smaller" in said
    assert "has lost another" in said
    assert "Traceback" not in said


def slow(rank: int) -> None:
    runs.slow_steps(0.3)


@pytest.mark.alone
def test_a_signal_to_all_saves_the_last_whole_step(tmp_path):
    mine = settings(tmp_path / "run", max_steps=50, **SHARDED)
    rows = Path(mine["metrics_dir"]) / "training_metrics.csv"
    started = processes.start(mine, 2, slow)
    wait_for(lambda: lines(rows) >= 1 + 3)
    for process in started:
        os.kill(process.pid, signal.SIGTERM)
    assert [runs.finish(process) for process in started] == [143, 143]
    newest = durable.checkpoints(Path(mine["output_dir"]))[-1]
    assert durable.checkpoint_fault(newest) is None
    assert int(newest.name.rpartition("-")[2]) >= 3
