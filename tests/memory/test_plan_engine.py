"""The memory plan with vLLM beside the trainer, by hand for the tutorial's 7B at rank 64."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastppo.cli import main
from fastppo.config import load_config
from fastppo.memory.plan import Plan, plan_config
from fastppo.memory.units import CONTEXT, GIB

ROOT = Path(__file__).resolve().parents[2]
FILE = "examples/qwen2.5-7b-ppo.yaml"
BESIDE = ["use_vllm=true", "vllm_mode=colocate"]
# 7,615,616,512 weights; an adapter of rank 64 on a layer's seven linear layers, whose widths add up
# to 90,112; two bytes each.
WEIGHTS = 2 * (7_615_616_512 + 28 * 64 * 90_112)
# Keys and values of 4 heads of 128 in 28 layers, 2048 tokens of a prompt and 1024 of a response.
SEQUENCE = 2 * 2 * 4 * 128 * 28 * 3072


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan_of(size: int, *changes: str) -> Plan:
    plan, _ = plan_config(load_config(FILE, [*BESIDE, *changes]), "gpu", card=size)
    return plan


def test_the_engine_has_its_own_base_and_all_that_is_left_of_its_share():
    plan = plan_of(80 * GIB)
    for phase in ("load", "rollout", "score", "update"):
        rows = plan.columns[phase].rows
        assert rows["vLLM weights"] == WEIGHTS
        assert rows["vLLM cache"] == int(0.3 * 80 * GIB) - WEIGHTS
    alone, _ = plan_config(load_config(FILE), "gpu", card=80 * GIB)
    assert plan.columns["update"].total == alone.columns["update"].total + 24 * GIB + CONTEXT
    assert "KV cache" not in plan.columns["rollout"].rows, "the trainer samples nothing"
    assert plan.step_peak <= alone.step_peak, "vLLM's memory is no tensor of the trainer's"


def test_asleep_it_leaves_scoring_and_update_and_waits_on_the_host():
    plan = plan_of(80 * GIB, "vllm_enable_sleep_mode=true")
    for phase in ("score", "update"):
        assert not any(row.startswith("vLLM") for row in plan.columns[phase].rows)
    assert plan.columns["rollout"].rows["vLLM weights"] == WEIGHTS
    assert plan.host["vLLM's weights while it sleeps"] == WEIGHTS


def test_on_several_gpus_each_has_its_part():
    rows = plan_of(80 * GIB, "vllm_tensor_parallel_size=4").columns["rollout"].rows
    assert rows["vLLM weights"] == WEIGHTS // 4


def test_24_gib_do_not_hold_a_7b_with_an_engine(capsys):
    asleep = ["vllm_enable_sleep_mode=true", "vllm_gpu_memory_utilization=0.62"]
    assert main([FILE, *BESIDE, *asleep, "--plan", "--gpu", "24GiB"]) == 3
    said = capsys.readouterr().out
    peak = plan_of(24 * GIB, *asleep).peak
    assert peak.phase == "rollout"
    assert peak.total > 2 * WEIGHTS, "two copies of the base are there at a time"
    assert f"does not fit 24GiB: {(peak.total - 24 * GIB) / GIB:.2f} GiB too much" in said
    assert f"its copy of the base is {WEIGHTS / GIB:.2f} GiB" in said
    assert f"host memory for vLLM's weights while it sleeps: {WEIGHTS / GIB:.2f} GiB" in said
    changes = said.partition("each with the peak after it:\n")[2]
    assert changes.split()[0] == "use_vllm=false"
    assert len(changes.splitlines()) == 1, "the trainer's own sampler is enough"


def test_a_share_that_holds_no_base_is_named_with_the_one_that_does(capsys):
    assert main([FILE, *BESIDE, "--plan", "--gpu", "48GiB"]) == 3
    said = capsys.readouterr().out
    needed = (WEIGHTS + SEQUENCE) / GIB  # 14.65 of 48: 0.305
    assert 14.6 < needed < 14.7
    assert (
        f"does not start: its copy of the base is {WEIGHTS / GIB:.2f} GiB, the cache of a sequence "
        f"of 3072 tokens {SEQUENCE / GIB:.2f}, and vllm_gpu_memory_utilization: 0.3 is 14.40 GiB; "
        "set it to 0.31"
    ) in said
    cured = ["vllm_gpu_memory_utilization=0.31"]
    assert main([FILE, *BESIDE, *cured, "--plan", "--gpu", "48GiB"]) == 0
    said = capsys.readouterr().out
    assert "beside the trainer: vllm_gpu_memory_utilization: 0.31 is 14.88" in said
