"""What the memory plan decides where the file says `auto`, and what else of a file it knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastppo.cli import main
from fastppo.config import Config
from fastppo.memory import auto
from fastppo.memory.advice import advise, choose_auto, choose_offloading
from fastppo.memory.inputs import AUTO_KEYS
from fastppo.memory.plan import Plan, make_plan
from fastppo.memory.units import GIB
from fastppo.memory.weights import Shapes
from fastppo.run.world import World
from tests.memory.test_plan import PPO, SEVEN_B, inputs


def resolve_auto(card: int, **changes: Any) -> tuple[Plan, dict[str, Any]]:
    plan = make_plan(inputs(auto=AUTO_KEYS, **changes), Shapes(SEVEN_B))
    chosen = choose_auto(plan, card * GIB)
    return plan.with_changes(**chosen), chosen


def test_auto_settings_fit_and_use_what_is_there():
    small, chosen = resolve_auto(24)
    assert small.fits(24 * GIB)
    assert chosen["activation_offloading"] == "checkpoint"
    assert not small.with_changes(activation_offloading="none").fits(24 * GIB)
    large, chosen = resolve_auto(80)
    assert large.fits(80 * GIB)
    assert chosen == {
        "activation_offloading": "none",
        "chunk_bytes": 512 << 20,
        "ppo_max_token_len_per_gpu": 5 * 2048,  # without recomputing 12 GiB each
        "log_prob_max_token_len_per_gpu": 8 * 2048,
        "generation_batch": 8,
    }
    more = {**chosen, "ppo_max_token_len_per_gpu": 6 * 2048}
    assert not large.with_changes(**more).fits(80 * GIB)


def test_auto_takes_least_memory_if_nothing_fits_and_changes_no_other_key():
    lean, chosen = resolve_auto(4, activation_offloading="none")
    assert chosen["generation_batch"] == 1
    assert lean.inputs.config.chunk_bytes == 16 << 20
    plan = make_plan(inputs(auto=("generation_batch",)), Shapes(SEVEN_B))
    assert choose_auto(plan, 80 * GIB) == {"generation_batch": 8}
    assert choose_auto(make_plan(inputs(), Shapes(SEVEN_B)), 80 * GIB) == {}


def test_auto_moves_nothing_to_host_memory_on_the_host():
    plan = make_plan(inputs(auto=("activation_offloading",), device="cpu"), Shapes(SEVEN_B))
    assert choose_auto(plan, GIB) == {"activation_offloading": "checkpoint"}
    assert choose_auto(plan.with_changes(offload_dir="spill"), GIB) == {
        "activation_offloading": "checkpoint+offload"
    }


def test_activations_are_kept_where_half_of_the_memory_has_room():
    plan = make_plan(inputs(), Shapes(SEVEN_B))
    kept = plan.with_changes(activation_offloading="none").peak.total
    assert kept > plan.peak.total + 10 * GIB
    assert choose_offloading(plan, 2 * kept) == {"activation_offloading": "none"}
    assert choose_offloading(plan, 2 * kept - 2) == {"activation_offloading": "checkpoint"}


@pytest.mark.parametrize(
    "asked",
    [
        {"disable_gradient_checkpointing": False},
        {"disable_gradient_checkpointing": True},
        {"use_unsloth_gc": True},
        {"activation_offloading": "checkpoint"},
        {"auto": ("activation_offloading",)},
        {"fsdp": "full_shard"},  # is sharded because memory is short
    ],
    ids=str,
)
def test_a_key_that_says_how_activations_are_kept_is_followed(asked):
    assert choose_offloading(make_plan(inputs(**asked), Shapes(SEVEN_B)), 4000 * GIB) == {}


@pytest.mark.parametrize(
    ("free", "longest", "mode"),
    [
        ([120], 4096, "none"),
        ([24], 4096, "checkpoint"),
        ([64], 4096, "checkpoint"),
        ([64], 64, "none"),  # the data are shorter than the keys allow
        ([120, 24, 120], 4096, "checkpoint"),  # one of three processes has little
    ],
)
def test_a_run_decides_by_its_data_and_by_the_process_with_least_memory(
    free, longest, mode, monkeypatch
):
    class Processes(World):
        def gather(self, value: Any) -> list[Any]:
            assert value == free[0] * GIB
            return [count * GIB for count in free]

    plan = make_plan(inputs(cutoff_len=4096, max_new_tokens=64, gpus=len(free)), Shapes(SEVEN_B))
    monkeypatch.setattr(auto, "plan_config", lambda *_: (plan, []))
    monkeypatch.setattr(auto, "available_memory", lambda *_: free[0] * GIB)
    world = Processes(size=len(free))
    config, decided, notes = auto.resolve_auto(
        plan.inputs.config, torch.device("cpu"), world, cutoff_len=longest
    )
    assert config.activation_offloading == decided.inputs.offload_mode == mode
    assert decided.inputs.config.cutoff_len == 4096  # the plan is still of what the keys allow
    assert notes == []


def test_shorter_data_fill_a_micro_batch_with_more_sequences():
    plan = make_plan(inputs(), Shapes(SEVEN_B))
    short = plan.for_lengths(cutoff_len=64, max_new_tokens=64)
    assert plan.inputs.update_batch == (1, 2048)
    assert short.inputs.update_batch == (8, 128)  # all of a step, 1024 of 2048 tokens
    assert short.peak.total < plan.peak.total


def test_where_memory_runs_out_kept_activations_are_recomputed_first():
    for keys in (
        {"activation_offloading": "none"},  # decided by a plan, or asked for
        {"disable_gradient_checkpointing": True},
        {"disable_gradient_checkpointing": True, "activation_offloading": "none"},
    ):
        plan = make_plan(inputs(**keys), Shapes(SEVEN_B))
        advice = advise(plan, 24 * GIB, Config.model_fields)
        assert advice.fits
        again = inputs(**{**keys, **advice.settings})
        assert again.offload_mode == "checkpoint"
        assert again.config.activation_offloading in (None, "checkpoint")


def test_a_plan_says_what_auto_comes_to(capsys):
    overrides = ["generation_batch=auto", "activation_offloading=auto"]
    assert main([str(PPO), *overrides, "--plan", "--gpu", "48GiB"]) == 0
    assert "auto: activation_offloading=none generation_batch=8" in capsys.readouterr().out


def test_a_budget_that_is_no_multiple_of_the_longest_sequence_is_filled_by_shorter_ones():
    assert inputs().update_batch == (1, 2048)
    assert inputs(ppo_max_token_len_per_gpu=100).update_batch == (1, 2048)  # a sequence runs alone
    assert inputs(ppo_max_token_len_per_gpu=3072).update_batch == (2, 1536)
    assert inputs(ppo_max_token_len_per_gpu=1 << 20).update_batch == (8, 2048)
    assert inputs(log_prob_max_token_len_per_gpu=8192).score_batch == (4, 2048)
    assert inputs(ppo_max_token_len_per_gpu=4096).score_batch == (2, 2048)


def test_states_in_8_bits_and_paged_states_by_hand():
    def plan(optim: str) -> Plan:
        return make_plan(inputs(optim=optim), Shapes(SEVEN_B))

    # 161,480,704 parameters: two bytes and two scales in 256: 0.305 GiB.
    eight = plan("adamw_8bit").columns["update"].rows["actor optimiser"] / GIB
    assert eight == pytest.approx(0.305, abs=0.001)
    paged = plan("paged_adamw_32bit")
    assert "actor optimiser" not in paged.columns["update"].rows
    assert paged.host["actor optimiser"] / GIB == pytest.approx(1.203, abs=0.001)
    lion = plan("lion_8bit").columns["update"].rows["actor optimiser"] / GIB
    assert lion == pytest.approx(0.305 / 2, abs=0.001)
    assert "actor optimiser" not in plan("sgd").columns["update"].rows
    # Of A (64 x in) and B (out x 64) about 1 number in 64.
    factored = plan("adafactor").columns["update"].rows["actor optimiser"] / GIB
    assert factored == pytest.approx(0.602 / 64, abs=0.001)


def test_a_streamed_reward_model_has_two_layers_on_the_device():
    # 233,057,792 parameters a layer in 2 bytes: 0.434 GiB; embedding and norm 1.015.
    streamed = inputs(rewards=("full",), stream_frozen=True)
    plan = make_plan(streamed, Shapes(SEVEN_B))
    assert plan.peak.rows["reward weights"] / GIB == pytest.approx(1.015 + 2 * 0.434, abs=0.001)
    assert plan.host["reward weights"] / GIB == pytest.approx(28 * 0.434, abs=0.01)


def test_written_answers_are_a_pass_with_all_gradients_there():
    plan = make_plan(inputs(ptx_coef=1.0, cutoff_len=4096, max_new_tokens=64), Shapes(SEVEN_B))
    (peak,) = [m for m in plan.peaks if m.name == "the PTX pass's loss"]
    assert peak.rows["critic gradients"] == plan.columns["update"].rows["critic gradients"]
