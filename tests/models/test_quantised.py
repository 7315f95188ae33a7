"""QLoRA: the settings that bitsandbytes gets, and steps on its CPU kernels."""

from __future__ import annotations

import weakref

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fastppo import toy
from fastppo.errors import UserError
from fastppo.models.batch import make_batch
from fastppo.models.load import load_base
from fastppo.models.quantised import quantization_config
from fastppo.ppo import checkpoint, trainer
from fastppo.run import save
from tests.tiers import slow_unless
from tests.tiny import hidden_as

BITS = [
    {"quantization_bit": 4},
    {"quantization_bit": 8},
    {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False, "bf16": True},
    {"quantization_bit": 4, "fp16": True},
    {"quantization_bit": 8, "fp16": True},
]


def test_the_defaults_are_llamafactorys(config):
    four = quantization_config(config(quantization_bit=4), 4, torch.bfloat16)
    assert (four.load_in_4bit, four.load_in_8bit) == (True, False)
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.bfloat16


def test_every_setting_of_the_file_reaches_bitsandbytes(config):
    settings = config(quantization_bit=4, quantization_type="fp4", double_quantization=False)
    other = quantization_config(settings, 4, torch.float32)
    assert other.bnb_4bit_compute_dtype == torch.float32
    assert (other.bnb_4bit_quant_type, other.bnb_4bit_use_double_quant) == ("fp4", False)
    eight = quantization_config(settings, 8, torch.float32)
    assert (eight.load_in_4bit, eight.load_in_8bit) == (False, True)


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory):
    """As wide as a block of 4-bit numbers at least, which is 64."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    toy.write_model(folder, hidden_size=64)
    return folder


@pytest.mark.parametrize("bits", slow_unless(lambda bits: bits == BITS[0], BITS), ids=str)
def test_a_quantised_run_starts_at_kl_0_learns_saves_and_resumes(
    config, wide_dir, tmp_path, bits, rollout
):
    settings = {"model_name_or_path": str(wide_dir), "metrics_dir": str(tmp_path / "metrics")}
    settings |= {**bits, "disable_gradient_checkpointing": False, "max_new_tokens": 24}
    # It tells any two responses apart: responses that score alike would teach nothing.
    settings |= {"reward_model": "tests.zoo:spread", "reward_model_type": "function"}
    state = trainer.init_state(config(**settings))
    up = state.roles.trunk.layers[0].mlp.up_proj.base_layer
    assert up.weight.dtype == (torch.uint8 if bits["quantization_bit"] == 4 else torch.int8)
    assert type(state.roles.base.get_output_embeddings()) is torch.nn.Linear
    state = trainer.step_update(state)
    row = state.metrics.rows[0]
    assert row["kl"] == 0.0
    assert row["score_std"] > 0
    assert row["grad_norm_actor"] > 0
    checkpoint.save_to_resume(state, tmp_path)
    resumed = trainer.init_state(config(**settings))
    checkpoint.resume(resumed, tmp_path / "checkpoint-1")
    batch = make_batch(rollout, range(4))
    for role in ("actor", "critic"):
        mine = hidden_as(state.roles, role, batch)
        assert torch.equal(hidden_as(resumed.roles, role, batch), mine)
    assert not torch.equal(hidden_as(state.roles, "reference", batch), mine)
    dtype = state.roles.autocast or torch.float32
    assert dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}.get(list(bits)[-1], dtype)
    base = AutoModelForCausalLM.from_pretrained(
        wide_dir,
        quantization_config=quantization_config(state.config, bits["quantization_bit"], dtype),
        dtype=dtype,
        device_map={"": "cpu"},
    )
    assert PeftModel.from_pretrained(base, str(tmp_path / "checkpoint-1")).peft_config


@pytest.mark.parametrize(
    "more", [pytest.param({}, marks=pytest.mark.slow), {"use_dora": True}], ids=str
)
def test_a_quantised_reference_model_and_a_quantised_critic_model(
    tiny_roles, wide_dir, tmp_path, more
):
    first = tiny_roles(model_name_or_path=str(wide_dir), **more)
    save.save_weights(first.model, tmp_path / "sft")
    made = tiny_roles(
        model_name_or_path=str(wide_dir),
        quantization_bit=4,
        critic="model",
        critic_model=str(wide_dir),
        ref_model=str(wide_dir),
        ref_model_adapters=str(tmp_path / "sft"),
        ref_model_quantization_bit=8,
        **more,
    )
    kinds = {
        role: made.places[role].model.get_base_model().model.layers[0].mlp.up_proj.base_layer
        for role in ("actor", "reference", "critic")
    }
    assert {role: type(layer).__name__ for role, layer in kinds.items()} == {
        "actor": "Linear4bit",
        "reference": "Linear8bitLt",
        "critic": "Linear4bit",
    }
    assert [count > 0 for _, _, count in made.table("one")] == [True, False, False, True]


def test_a_quantised_module_cannot_be_an_additional_target(tiny_roles, wide_dir):
    with pytest.raises(UserError, match="additional_target: up_proj: its weights are quantised"):
        tiny_roles(
            model_name_or_path=str(wide_dir), quantization_bit=4, additional_target="up_proj"
        )


def test_the_base_without_quantization_bit_is_not_quantised(config):
    assert not getattr(load_base(config(), torch.device("cpu")), "is_quantized", False)


def test_an_8_bit_layer_rounds_its_weights_alone_and_holds_no_input(config, wide_dir):
    """bitsandbytes' own keeps its input in the graph, where checkpointing cannot free it."""
    base = load_base(config(model_name_or_path=str(wide_dir)), torch.device("cpu"), bits=8)
    layer = base.model.layers[0].mlp.up_proj
    scale_V = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    weight_VD = layer.weight.float() * scale_V[:, None] / 127
    leaf = torch.randn(3, 5, 64, requires_grad=True)
    x = leaf * 1.0
    held = weakref.ref(x)
    out = layer.eval()(x)
    expected = torch.nn.functional.linear(x, weight_VD)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    del x, expected
    assert held() is None
    out.sum().backward()
    torch.testing.assert_close(leaf.grad, weight_VD.sum(0).expand(3, 5, 64), atol=1e-5, rtol=1e-5)
