"""What the keys of the roles come to in the memory plan, and what it does not count."""

from __future__ import annotations

import json

import pytest

from fastppo.cli import main
from fastppo.config import config_from_dict, load_config
from fastppo.memory.advice import REDUCTIONS, choose_offloading
from fastppo.memory.plan import make_plan, plan_config
from fastppo.memory.units import GIB
from fastppo.memory.weights import Shapes
from tests.memory.test_plan import CONFIG_JSON, PPO, SEVEN_B, inputs
from tests.project import PPO as USER


def test_an_adapter_that_trains_on_has_its_own_rank_and_a_frozen_copy(project):
    """The adapter's 16 and not lora_rank's 8; the copy in float32, as PEFT loads it."""
    adapter = {"r": 16, "target_modules": ["q_proj", "v_proj"]}
    for folder in ("reward", "sft"):
        (project / folder).mkdir(exist_ok=True)
        (project / folder / "adapter_config.json").write_text(json.dumps(adapter))
    (project / "model" / "config.json").write_text(json.dumps(CONFIG_JSON))
    config = config_from_dict({**USER, "adapter_name_or_path": "reward, sft"})
    plan, _ = plan_config(config, "gpu")
    size = plan.shapes.base.lora_parameters(16, "q_proj,v_proj") * 4
    rows = plan.columns["load"].rows
    assert rows["actor adapter"] == rows["reference adapter"] == size
    merged = config_from_dict(
        {**USER, "adapter_name_or_path": "sft", "create_new_adapter": True, "lora_target": "q_proj"}
    )
    rows = plan_config(merged, "gpu")[0].columns["load"].rows
    assert "reference adapter" not in rows
    assert rows["actor adapter"] == plan.shapes.base.lora_parameters(8, "q_proj") * 4


def test_no_bits_are_proposed_for_a_base_that_takes_a_merge():
    plan = make_plan(inputs(adapter_name_or_path="a,b"), Shapes(SEVEN_B))
    assert not any("quantization_bit" in reduction(plan) for reduction in REDUCTIONS)
    plan = make_plan(inputs(adapter_name_or_path="a"), Shapes(SEVEN_B))
    assert any("quantization_bit" in reduction(plan) for reduction in REDUCTIONS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["finetuning_type=full", "reward_model_type=function", "reward_model=a:b"],
        ["finetuning_type=freeze", "reward_model_type=function", "reward_model=a:b"],
        ["critic=model", "critic_finetuning_type=full"],
        ["critic=model", "critic_model=Qwen/Qwen2.5-0.5B"],
        ["quantization_bit=4"],
        ["quantization_bit=8", "ref_model=Qwen/Qwen2.5-7B", "ref_model_quantization_bit=4"],
    ],
    ids=" ".join,
)
def test_what_the_roles_keys_ask_for_is_planned(arguments, capsys):
    """The plan has these values, and the rows of the models that they need."""
    assert main([str(PPO), *arguments, "--plan", "--gpu", "4000GiB"]) == 0
    out = capsys.readouterr().out
    config = load_config(PPO, arguments)
    plan, _ = plan_config(config, "gpu")
    plan = plan.with_changes(**choose_offloading(plan, 4000 * GIB))
    for word in arguments:
        key, _, value = word.partition("=")
        assert str(getattr(plan.inputs.config, key)) == value
    there = "reference weights" in plan.peak.rows
    assert there == (config.finetuning_type != "lora" or config.ref_model is not None)
    assert ("critic weights" in plan.peak.rows) == (config.critic == "model")
    assert f"peak {plan.peak.total / GIB:.2f} GiB" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["additional_target=norm"], "additional_target: the plan does not count"),
        (
            ["finetuning_type=freeze", "freeze_extra_modules=norm"],
            "freeze_extra_modules: the plan does not count single modules that train whole",
        ),
        (
            ["finetuning_type=freeze", "freeze_trainable_modules=mlp"],
            "freeze_trainable_modules: the plan does not count",
        ),
    ],
)
def test_what_is_not_counted_is_refused_in_a_line(arguments, words, capsys):
    reward = ["reward_model_type=function", "reward_model=a:b"]
    assert main([str(PPO), "--plan", *reward, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_states_behind_shared_layers_are_planned_for_the_whole_rollout():
    """8 sequences of 2048 tokens, 3584 numbers of two bytes each; an evaluation here has 64."""
    rollout = 8 * 2048 * 3584 * 2
    upper = {"rewards": ("function",), "lora_layers": 9}
    plan = make_plan(inputs(**upper), Shapes(SEVEN_B))
    for phase, there in {"load": 0, "rollout": 0, "score": rollout, "update": rollout}.items():
        peaks = [peak for peak in plan.peaks if peak.phase == phase]
        assert {peak.rows.get("shared states", 0) for peak in peaks} == {there}
    large = plan.with_changes(per_device_eval_batch_size=64, eval_max_samples=64)
    evaluation = [m for m in large.peaks if m.evaluation and m.phase == "score"]
    assert {peak.rows["shared states"] for peak in evaluation} == {8 * rollout}
    assert large.step_peak == plan.step_peak
    whole = make_plan(inputs(rewards=("function",)), Shapes(SEVEN_B))
    assert not any("shared states" in peak.rows for peak in whole.peaks)


def test_states_behind_shared_layers_go_where_activations_go():
    upper = {"rewards": ("function",), "lora_layers": 9}
    plan = make_plan(inputs(**upper, activation_offloading="checkpoint+offload"), Shapes(SEVEN_B))
    assert plan.host["shared states"] == 8 * 2048 * 3584 * 2
    assert not any("shared states" in peak.rows for peak in plan.peaks)


def test_an_eight_bit_base_shares_nothing():
    upper = {"rewards": ("function",), "lora_layers": 9}
    assert inputs(**upper, quantization_bit=4).shared_layers(28) == 19
    assert inputs(**upper, quantization_bit=8).shared_layers(28) == 0
