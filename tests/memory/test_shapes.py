"""The shape that a published config.json gives, with what its family takes for granted."""

from __future__ import annotations

import json

from fastppo.memory.shapes import TABLE, find_shape_and_source, from_config
from tests.memory.test_plan import CONFIG_JSON


def test_a_published_config_that_leaves_out_what_is_usual_gives_the_tables_shape(tmp_path):
    """Gemma 3's says of its text model what differs from transformers' defaults, and no more."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"model_type": "gemma3_text", "sliding_window": 1024}
    data = {"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(data))
    shape, source = find_shape_and_source(str(tmp_path))
    assert shape == TABLE["google/gemma-3-4b"]
    assert source.endswith(
        "(its text model; what else there is, such as a vision tower, is not counted)"
    )


def test_a_window_in_every_layer_is_the_tables():
    """Mistral 7B's first version has one and no layer_types; the later ones have none."""
    data = {**CONFIG_JSON, "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096}
    data |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    data |= {"intermediate_size": 14336, "sliding_window": 4096}
    assert from_config(data, "config.json") == TABLE["mistralai/Mistral-7B-v0.1"]
    v3 = {**data, "vocab_size": 32768, "sliding_window": None}
    assert from_config(v3, "config.json") == TABLE["mistralai/Mistral-7B-v0.3"]
