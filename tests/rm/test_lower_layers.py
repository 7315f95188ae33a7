"""Frozen lowest layers of stage rm: run once a text, with the training that all layers give."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fastppo import toy
from fastppo.cli import main
from fastppo.models import load
from fastppo.models.shared_layers import SharedLayers
from fastppo.models.value_head import new_value_head
from fastppo.offload.activations import find_layers
from fastppo.rm import lower_layers
from fastppo.rm.lower_layers import ROLE, LowerLayers, batch_of, compare, frozen_lowest_layers
from fastppo.rm.model import RewardModel
from tests import zoo
from tests.tiny import write_rm
from tests.written import lines, read

LAYERS = 4
UPPER = {
    "lora_layers": {"lora_layers": 1},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
}
SAID = "run once, before the first epoch"
EVERY = "in every epoch"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep") / "model"
    toy.write_model(folder, layers=LAYERS)
    return folder


@pytest.fixture
def train(model_dir, tmp_path, monkeypatch, capsys):
    """Runs stage rm on 12 pairs of which 4 are held out; the folder, and what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(name="out", **changes):
        settings = {
            "output_dir": name,
            "overwrite_output_dir": True,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "num_train_epochs": 3,
            **changes,
        }
        write_rm(tmp_path, model_dir, **settings)
        capsys.readouterr()
        assert main(["rm.yaml"]) == 0
        return tmp_path / name, " ".join(capsys.readouterr().out.split())

    return run


@pytest.fixture
def passes(monkeypatch):
    """How often each layer runs, by its number."""
    counts = [0] * LAYERS
    own = LlamaDecoderLayer.forward

    def forward(self, *args, **kwargs):
        counts[self.self_attn.layer_idx] += 1
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    return counts


@pytest.mark.parametrize("name", UPPER)
def test_the_training_is_that_of_all_layers(train, name):
    kept, said = train("kept", **UPPER[name])
    whole, other = train("whole", keep_lower_states=False, **UPPER[name])
    assert f"layers 1 to 3 of 4 {SAID}" in said
    assert SAID not in other
    rows = zip(lines(kept / "trainer_log.jsonl"), lines(whole / "trainer_log.jsonl"), strict=True)
    losses = [(a["loss"], b["loss"]) for a, b in rows if "loss" in a]
    assert len(losses) == 12
    assert losses[0][0] != pytest.approx(losses[-1][0], rel=0.05)
    for a, b in losses:
        assert a == pytest.approx(b, abs=1e-4)
    found, wanted = (read(folder / "eval_results.json") for folder in (kept, whole))
    for metric in ("eval_loss", "eval_margin", "eval_chosen_score"):
        assert found[metric] == pytest.approx(wanted[metric], abs=1e-4)


def test_the_lowest_layers_run_once_a_text_and_not_once_an_epoch(train, passes):
    """24 texts, 8 at a time: as many passes for six epochs as for three."""
    train(per_device_eval_batch_size=4, disable_gradient_checkpointing=True, lora_layers=1)
    first = list(passes)
    passes[:] = [0] * LAYERS
    train(
        per_device_eval_batch_size=4,
        disable_gradient_checkpointing=True,
        lora_layers=1,
        num_train_epochs=6,
    )
    assert passes[:3] == first[:3]
    assert passes[3] - first[3] == 12  # 8 pairs, two a step, three epochs more


def test_the_file_is_gone_after_the_run(train):
    folder, said = train(lora_layers=2)
    assert f"layers 1 to 2 of 4 {SAID}" in said
    assert "temporary file in out" in said
    size = float(said.split("their states take ")[1].split(" ")[0])
    assert size < 1
    assert not [path for path in folder.iterdir() if path.name.startswith("tmp")]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_epochs": 1, "lora_layers": 1},
        {"max_steps": 4, "lora_layers": 1},
        {"keep_lower_states": False, "lora_layers": 1},
        {},
        {"finetuning_type": "full"},
        {"finetuning_type": "freeze", "freeze_trainable_layers": -1},
        {"finetuning_type": "freeze", "freeze_extra_modules": "embed_tokens"},
    ],
    ids=lambda changes: ", ".join(changes) or "lora",
)
def test_nothing_is_kept_where_it_would_save_nothing_or_be_wrong(train, passes, changes):
    _, said = train(disable_gradient_checkpointing=True, **changes)
    assert SAID not in said
    assert EVERY not in said
    assert passes[0] == passes[LAYERS - 1] > 3


def test_a_base_that_is_another_in_training_runs_whole_and_says_so(
    train, model_dir, tmp_path, monkeypatch
):
    """By dropout, which is turned off where a base is loaded: noise in a router stays."""
    monkeypatch.setattr(load, "disable_dropout", lambda _: None)
    folder = tmp_path / "dropout"
    shutil.copytree(model_dir, folder)
    config = read(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    _, said = train(model_name_or_path=str(folder), lora_layers=1)
    assert "layers 1 to 3 run in every epoch: in training they give something else" in said
    assert SAID not in said


def test_dropout_of_the_adapters_is_above_them(train):
    _, said = train(lora_layers=1, lora_dropout=0.5)
    assert SAID in said


def test_a_disk_without_room_is_left_alone(train, monkeypatch):
    monkeypatch.setattr(lower_layers.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**18))
    _, said = train(lora_layers=1)
    assert "layers 1 to 3 run in every epoch: their states would take 0 MiB" in said
    assert "of which they may take a quarter" in said


def test_a_model_that_does_not_start_from_states_runs_whole(train, monkeypatch):
    def refuse(*_):
        raise TypeError("no states")

    monkeypatch.setattr(SharedLayers, "_skip", refuse)
    _, said = train(lora_layers=1)
    assert "layers 1 to 3 run in every epoch: no states" in said


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(train):
    straight, _ = train("straight", lora_layers=1, save_steps=5)
    broken, _ = train("broken", lora_layers=1, save_steps=5)
    for path in (broken / "checkpoint-10", broken / "checkpoint-12"):
        shutil.rmtree(path, ignore_errors=True)
    again = {"resume_from_checkpoint": "broken/checkpoint-5", "overwrite_output_dir": False}
    resumed, said = train("broken", lora_layers=1, save_steps=5, **again)
    assert SAID in said
    assert "resumes from" in said
    for name in ("adapter_model", "value_head"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (straight, resumed))
        assert all(torch.equal(a[key], b[key]) for key in a)


def reward_of(family):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(zoo.config_of(family)).eval()
        head = new_value_head(base.config.get_text_config().hidden_size, torch.device("cpu"))
        head.weight.data.normal_()
    return RewardModel(base, head, autocast=None)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "phi", "cohere2"])
def test_scores_of_every_family_are_those_of_the_whole_pass(family, tmp_path):
    model = reward_of(family)
    layers = find_layers(model.model)
    count = len(layers) - 1
    model.requires_grad_(False)
    for parameter in layers[-1].parameters():
        parameter.requires_grad_(True)
    assert frozen_lowest_layers(model.model) == count
    shared = SharedLayers({ROLE: layers}, count, on_host=True)
    texts = [tuple(range(40, 40 + n)) for n in (12, 3, 7, 9)]
    states_ND, problem = compare(model, shared, texts[0])
    assert not problem
    lower = LowerLayers(
        shared, texts, dtype=states_ND.dtype, size=states_ND.shape[1], folder=tmp_path
    )
    ids_BT, mask_BT = batch_of(texts, torch.device("cpu"))
    model.eval()
    with torch.no_grad():
        wanted = model(ids_BT, mask_BT)
        lower.write(model, rows=3)
        model.lower = lower
        found = model(ids_BT, mask_BT)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        lower.states.state_ND.zero_()  # it starts from them: without them it is another
        assert not torch.allclose(model(ids_BT, mask_BT), wanted, atol=1e-3)
        # A text that is not among them runs whole.
        other = ids_BT + 1
        expected = RewardModel(model.model, model.head, autocast=None)(other, mask_BT)
        assert torch.equal(model(other, mask_BT), expected)
