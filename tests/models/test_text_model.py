"""Shapes are the loaded model's, of its text model: never the top-level config's or nn.Linear's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastppo.errors import UserError
from fastppo.memory.shapes import FAMILIES as PLANNED
from fastppo.memory.shapes import from_config
from fastppo.models import build as roles
from fastppo.models.adapters import (
    linear_layers,
    lora_targets,
)
from fastppo.models.load import hidden_size
from fastppo.models.lora import merge_active_adapters
from fastppo.models.weight_tuning import (
    text_parameters,
)
from fastppo.ppo.rollout import cache_bytes
from tests import zoo
from tests.tiny import make_config, stir

CPU = torch.device("cpu")
IDS = torch.arange(40, 64)[None]


@pytest.fixture
def built(tmp_path):
    """Roles on a family's tiny model."""

    def make(family: str, **changes: Any) -> roles.Roles:
        folder = tmp_path / family
        if not folder.exists():
            zoo.write(family, folder)
        room = {"cutoff_len": 64, "max_new_tokens": 8}
        return roles.build(make_config(folder, tmp_path, **{**room, **changes}), CPU)

    return make


def last_names(names: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def adapted(made: roles.Roles) -> set[str]:
    """Full names of the modules that the actor's adapter is on."""
    names = (name for name, _ in made.base.named_modules())
    return {n.removesuffix(".lora_A.default") for n in names if n.endswith(".lora_A.default")}


@pytest.mark.parametrize(
    ("asked", "found"), [("all", {"c_attn", "c_proj", "c_fc"}), ("c_attn", {"c_attn"})]
)
def test_gpt2s_conv1d_takes_adapters(built, asked, found):
    made = built("gpt2", lora_target=asked)
    assert last_names(adapted(made)) == found
    settings = made.places["actor"].model.peft_config["default"]
    assert settings.fan_in_fan_out


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_on_conv1d_changes_nothing_at_first_and_merges_exactly(built, use_dora):
    made = built("gpt2", lora_target="all", use_dora=use_dora)
    with torch.no_grad():
        with made.use("reference"):
            base = made.hidden(IDS)
        assert torch.allclose(made.hidden(IDS), base, atol=1e-6)
        stir([p for p in made.trainable_parameters("actor") if p.dim() == 2], 0)
        before = made.hidden(IDS)
        assert not torch.allclose(before, base, atol=1e-2)
        own = [module.weight.clone() for module in linear_layers(made.base).values()]
        with merge_active_adapters(made.base):
            merged = made.base.transformer.h[0].attn.c_attn
            assert merged.merged
            assert torch.allclose(made.hidden(IDS), before, atol=1e-5)
        layers = linear_layers(made.base).values()
        assert all(torch.equal(m.weight, w) for m, w in zip(layers, own, strict=True))


@pytest.mark.parametrize(("family", "width"), [("opt", 16), ("gpt2", 32), ("gemma3", 32)])
def test_a_value_head_is_as_wide_as_the_last_hidden_state(built, family, width):
    made = built(family, finetuning_type="full", critic="shared")
    assert hidden_size(made.base) == width
    with torch.no_grad():
        assert made.value(made.hidden(IDS)[0]).shape == (IDS.shape[1],)


def test_adapters_stay_out_of_towers_that_text_never_passes(built):
    made = built("gemma3")
    found = adapted(made)
    assert found
    assert all(name.startswith("model.language_model.layers.") for name in found)
    assert last_names(found) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_lora_layers_and_whole_modules_of_a_multimodal_model_are_the_text_models(built):
    made = built("gemma3", lora_layers=1, lora_target="q_proj", additional_target="norm")
    assert adapted(made) == {"model.language_model.layers.1.self_attn.q_proj"}
    whole = [n for n, p in made.base.named_parameters() if p.requires_grad and "lora_" not in n]
    assert "model.language_model.norm.modules_to_save.default.weight" in whole
    assert all(name.startswith("model.language_model.") for name in whole)


@pytest.mark.parametrize("changes", [{"finetuning_type": "full"}, {"finetuning_type": "freeze"}])
def test_full_and_freeze_leave_towers_as_they_are(built, changes):
    made = built("gemma3", critic="shared", **changes)
    names = {n for n, p in made.base.named_parameters() if p.requires_grad}
    assert names
    assert all(n.startswith(("model.language_model.", "lm_head.")) for n in names)
    layers = [p for n, p in made.base.named_parameters() if ".vision_tower." in n]
    assert layers
    assert not any(p.requires_grad for p in layers)


def test_activations_are_those_of_the_text_models_layers(built):
    """The tower has more parameters here; its layers save nothing."""
    made = built("gemma3", disable_gradient_checkpointing=False)
    layers = made.base.activation_offload.layers
    assert list(layers) == list(made.base.model.language_model.layers)


def test_a_streamed_reference_streams_the_text_models_layers(built, tmp_path):
    zoo.write("gemma3", tmp_path / "gemma3")
    made = built("gemma3", ref_model=str(tmp_path / "gemma3"), stream_frozen=True)
    with made.use("reference"):
        streamed = made.base.streamed.layers
        assert streamed == list(made.base.model.language_model.layers)


# Keys and values of one token in float32: 2 x layers x key heads x head size x 4 bytes.
CACHES = {"llama": 2 * 2 * 2 * 8 * 4, "falcon": 2 * 2 * 1 * 8 * 4, "gemma3": 2 * 2 * 2 * 8 * 4}


@pytest.mark.parametrize(("family", "expected"), CACHES.items())
def test_the_cache_is_as_large_as_the_models_own(built, family, expected):
    assert cache_bytes(built(family)) == expected


@pytest.mark.parametrize(("family", "scale"), [("cohere2", 0.0625), ("granite", 1 / 3)])
def test_scaled_logits_are_scored_as_the_model_scales_them(built, family, scale):
    made = built(family)
    made.check_head(IDS[0].tolist())
    assert made.lm_head.scale == pytest.approx(scale)


def test_a_scale_that_is_not_known_is_still_refused(built):
    made = built("granite")
    made.base.config.logits_scaling = 1.0
    made.base.forward = lambda **how: scaled(type(made.base).forward(made.base, **how))
    with pytest.raises(UserError, match=r"not head\(hidden\)"):
        made.check_head(IDS[0].tolist())


def scaled(output: Any) -> Any:
    output.logits = output.logits / 3
    return output


def test_a_model_without_a_linear_layer_is_refused_with_the_way_out(tmp_path):
    config = make_config(zoo.write("gpt2", tmp_path / "gpt2"), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    base.transformer.h = torch.nn.ModuleList()
    with pytest.raises(UserError, match="no linear layer that takes an adapter; use finetuning"):
        lora_targets(config, base)


@pytest.mark.parametrize(("kind", "said"), [("lora", True), ("full", False)])
def test_experts_that_take_no_adapter_are_said(built, kind, said):
    """Two layers of four experts, each 3 x 32 x 64, are 49152 of Mixtral's 72288 parameters."""
    notes = built("mixtral", finetuning_type=kind, critic="shared").notes
    assert sum(p.numel() for p in on_meta("mixtral").parameters()) == 72288
    line = "the experts, 68% of all parameters, take no adapter and stay as they are"
    assert (line in notes) is said


def test_a_model_that_does_not_name_its_head_is_refused(built, monkeypatch):
    monkeypatch.setattr("transformers.PhiForCausalLM.get_output_embeddings", lambda self: None)
    with pytest.raises(UserError, match=r"\(PhiForCausalLM\) does not say which of its layers"):
        built("phi")


def on_meta(family: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(zoo.config_of(family, **changes))


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_memory_plan_has_the_loaded_models_shapes_or_says_that_it_does_not(family):
    data = json.loads(zoo.config_of(family).to_json_string())
    if data["model_type"] not in PLANNED:
        with pytest.raises(UserError, match=f"of the family {family}, and the memory plan knows"):
            from_config(data, "config.json")
        return
    model, shape = on_meta(family), from_config(data, "config.json")
    assert shape.parameters == sum(p.numel() for p in text_parameters(model).values())
    linears = {name.rpartition(".")[2]: m for name, m in linear_layers(model).items()}
    assert shape.linears == {n: (m.in_features, m.out_features) for n, m in linears.items()}


def test_the_memory_plan_counts_biases():
    biases = {"attention_bias": True, "mlp_bias": True}
    data = json.loads(zoo.config_of("llama", **biases).to_json_string())
    counted = sum(p.numel() for p in on_meta("llama", **biases).parameters())
    assert from_config(data, "config.json").parameters == counted


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "cohere2"])
def test_the_memory_plan_counts_as_many_cached_tokens_as_the_model_keeps(family, tmp_path: Path):
    """transformers keeps one token less than the window: the next one takes its place."""
    model = AutoModelForCausalLM.from_pretrained(zoo.write(family, tmp_path))
    shape = from_config(json.loads((tmp_path / "config.json").read_text()), "config.json")
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    kept = sum(layer.keys.shape[2] for layer in cache.layers)
    assert kept == shape.cached_tokens(IDS.shape[1]) - shape.sliding_layers
