"""The memory plan of a run that several GPUs share: what each needs, and what they send."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastppo.cli import main
from fastppo.config import load_config
from fastppo.memory.plan import plan_config
from fastppo.memory.units import MIB, REDUCED_BYTES

ROOT = Path(__file__).resolve().parents[2]
FILE = "examples/qwen2.5-7b-ppo.yaml"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def peaks(gpus: int, *changes: str) -> dict[str, int]:
    """The highest peak of each phase, in bytes."""
    plan, _ = plan_config(load_config(FILE, list(changes)), "gpu", gpus)
    return {phase: peak.total for phase, peak in plan.columns.items()}


@pytest.mark.parametrize("gpus", range(1, 17))
def test_no_phase_needs_more_on_more_gpus_but_for_the_copy_that_is_summed(gpus):
    alone = peaks(1, "gradient_accumulation_steps=4")
    shared = peaks(gpus, "gradient_accumulation_steps=4")
    assert shared["load"] == alone["load"], "nothing is sharded"
    for phase in ("rollout", "score"):
        assert shared[phase] <= alone[phase]
    assert shared["update"] <= alone["update"] + REDUCED_BYTES


def test_the_kv_cache_is_that_of_a_gpus_own_prompts():
    """Eight prompts on four GPUs are two on each: as a run of two prompts has."""
    four, _ = plan_config(load_config(FILE, ["per_device_train_batch_size=8"]), "gpu", 4)
    two, _ = plan_config(load_config(FILE, ["per_device_train_batch_size=2"]), "gpu")
    assert [
        p.rows["KV cache"] for p in four.peaks if p.phase == "rollout" and not p.evaluation
    ] == [p.rows["KV cache"] for p in two.peaks if p.phase == "rollout" and not p.evaluation]


def test_the_lines_by_hand(capsys):
    """2 (n - 1) / n of the gradients pass through each GPU of a ring: with 2 GPUs, all of them."""
    words = ["per_device_train_batch_size=3", "gradient_accumulation_steps=1", "ppo_epochs=2"]
    words += ["ppo_buffer_size=1", "num_generations=1"]
    assert main([FILE, *words, "--plan", "--gpu", "80GiB", "--gpus", "2"]) == 0
    said = capsys.readouterr().out
    assert "each of 2 GPUs has 1 or 2 of a step's 3 prompts; the table is one GPU's" in said
    plan, _ = plan_config(load_config(FILE, words), "gpu", 2)
    trained = plan.gradient_bytes / MIB
    assert (
        f"adds up {trained:.1f} MiB of gradients, for which a ring sends {trained:.1f} MiB from "
        f"each GPU; 2 a step: {2 * trained:.1f} MiB"
    ) in said


def test_one_gpu_has_no_lines_on_others(capsys):
    assert main([FILE, "--plan", "--gpu", "80GiB", "--gpus", "1"]) == 0
    alone = capsys.readouterr().out
    assert main([FILE, "--plan", "--gpu", "80GiB"]) == 0
    assert capsys.readouterr().out == alone
    assert "GPUs" not in alone


FSDP = ("reward_model_type=function", "reward_model=fastppo.toy:vowels", "fsdp=full_shard")


@pytest.mark.parametrize("gpus", [2, 4, 7])
def test_each_gpu_holds_its_part_of_the_layers_and_two_whole_ones(gpus):
    """By hand: Qwen2.5-7B has 28 layers of 233,057,792 numbers, and 7,615,616,512 in all."""
    plan, _ = plan_config(load_config(FILE, list(FSDP)), "gpu", gpus)
    shape = plan.shapes.base
    assert (shape.layers, shape.layer_parameters) == (28, 233_057_792)
    rest = 7_615_616_512 - 28 * 233_057_792
    part = -(-28 * 233_057_792 // gpus)
    held = {peak.rows["base weights"] for peak in plan.peaks}
    assert held == {2 * (part + 2 * 233_057_792 + rest)}
    alone, _ = plan_config(load_config(FILE, list(FSDP)), "gpu", 1)
    assert {peak.rows["base weights"] for peak in alone.peaks} == {2 * 7_615_616_512}


def test_the_line_on_shards_says_what_a_pass_receives(capsys):
    """Three quarters of 28 x 233,057,792 numbers of two bytes come from the other three GPUs."""
    assert main([FILE, *FSDP, "--plan", "--gpu", "80GiB", "--gpus", "4"]) == 0
    said = capsys.readouterr().out
    assert f"receives {28 * 233_057_792 * 2 * 3 / 4 / MIB:.1f} MiB" in said
    assert "the base's 14525.6 MiB" in said
