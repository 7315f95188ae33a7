"""The dtype of a run: the trainer's rule is the memory plan's, and LLaMA-Factory's on a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastppo import toy
from fastppo.config.model import own_dtype
from fastppo.errors import UserError
from fastppo.memory.inputs import PlanInputs
from fastppo.memory.shapes import find_shape
from fastppo.models.load import advice_on_hub, autocast_dtype, compute_dtype

GPU, CPU = torch.device("cuda"), torch.device("cpu")  # looked at by name: none has to be there


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "model"
    toy.write_model(path)
    return path


@pytest.mark.parametrize(
    ("own", "asked", "on_gpu", "on_cpu"),
    [
        ("bfloat16", None, "bfloat16", "float32"),
        ("float16", None, "bfloat16", "float32"),  # as large, without a loss scaler
        ("float32", None, "float32", "float32"),
        (None, None, "float32", "float32"),
        ("bfloat16", "bf16", "bfloat16", "bfloat16"),
        ("float32", "bf16", "bfloat16", "bfloat16"),
        (None, "bf16", "bfloat16", "bfloat16"),
        ("bfloat16", "fp16", "float16", "float16"),
        ("float16", "fp16", "float16", "float16"),
        ("float32", "fp16", "float16", "float16"),
    ],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])  # transformers 5 and 4
def test_trainer_and_plan_agree_on_the_dtype(config, folder, own, asked, on_gpu, on_cpu, key):
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data = {k: v for k, v in data.items() if k not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps({**data, **({} if own is None else {key: own})}), encoding="utf-8")
    settings = config(model_name_or_path=str(folder), **{asked: True} if asked else {})
    for device, name, expected in ((GPU, "gpu", on_gpu), (CPU, "cpu", on_cpu)):
        assert compute_dtype(settings, device) == getattr(torch, expected)
        planned = PlanInputs.of(settings, find_shape(str(folder)), device=name)
        assert planned.dtype == expected
        assert planned.autocast == (expected != "float32")
        half = None if expected == "float32" else getattr(torch, expected)
        assert autocast_dtype(settings, device) == half


def test_the_dtype_of_a_model_within_a_model():
    assert own_dtype({"dtype": "float32", "text_config": {"dtype": "bfloat16"}}) == "bfloat16"
    assert own_dtype({"dtype": "bfloat16", "text_config": {}}) == "bfloat16"
    assert own_dtype({"torch_dtype": torch.float16}) == "float16"


def test_a_config_json_that_is_none_is_one_line(config, tmp_path):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be loaded .*; check the folder"):
        compute_dtype(config(model_name_or_path=str(tmp_path)), GPU)


def test_a_16_bit_checkpoint_is_float32_on_a_cpu(tiny_roles, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    made = tiny_roles(model_name_or_path=str(tmp_path / "half"))
    assert {p.dtype for p in made.base.parameters()} == {torch.float32}
    assert not made.autocast


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("We couldn't connect to 'https://huggingface.co' to load the files", "hf download o/n"),
        ("Cannot find the requested files in the disk cache and outgoing traffic", "hf download"),
        ("You are trying to access a gated repo.", "set HF_TOKEN"),
        ("If this is a private repository, make sure to pass a token", "set HF_TOKEN"),
        ("invalid header", "check the folder"),
    ],
)
def test_the_advice_on_a_model_that_does_not_load_is_of_its_cause(message, advice, tmp_path):
    """Who sits behind a firewall is not helped by 'check the name'."""
    assert advice in advice_on_hub("o/n", message)
    assert advice_on_hub(str(tmp_path), message) == "check the folder or the hub name"
