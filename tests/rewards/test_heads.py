"""The weights are believed, whatever a config says or leaves out; and none is lost in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastppo.config.weights import find_head, folder_shapes
from fastppo.errors import UserError
from fastppo.models.adapters import load_peft_model
from fastppo.models.build import build
from fastppo.models.load import load_base
from fastppo.ppo.evaluate_only import load_policy
from fastppo.rewards.classifier import ClassifierReward
from fastppo.rewards.model import load_full
from fastppo.rm.load import folder_of_head
from fastppo.run.preflight import check_reward_full
from tests.rewards.matrix import (
    Places,
    classifier,
    llamafactory_whole,
    neox_with_bias,
    tokenizer_of,
    trl_value_head,
)

DEVICE = torch.device("cpu")


@pytest.fixture
def places(model_dir, reward_dir, tmp_path):
    return Places(model_dir, reward_dir, tmp_path)


@pytest.fixture
def load(config, template):
    def make(folder, **keys):
        settings = config(reward_model=str(folder), reward_model_type="full", **keys)
        check_reward_full(settings, str(folder))
        return load_full(str(folder), settings, DEVICE, template)

    return make


@pytest.fixture
def one_score(places):
    """As OpenRLHF saves it: one row in score.weight, and no word of labels in config.json."""
    folder = places.out / "one"
    classifier(places).save_pretrained(folder)
    tokenizer_of(places).save_pretrained(folder)
    edit(folder, id2label=None, label2id=None, num_labels=None)
    return folder


def edit(folder, **keys):
    path = folder / "config.json"
    found = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: x for key, x in found.items() if x is not None}))


def change(folder, **tensors):
    path = folder / "model.safetensors"
    found = {**load_file(path), **{name.replace("__", "."): x for name, x in tensors.items()}}
    save_file({k: x for k, x in found.items() if x is not None}, path, {"format": "pt"})


@pytest.mark.parametrize("architecture", ["LlamaForSequenceClassification", "RewardModel", None])
def test_one_row_in_the_head_is_one_label(load, one_score, architecture):
    edit(one_score, architectures=architecture and [architecture])
    made = load(one_score)
    assert isinstance(made, ClassifierReward)
    head = load_file(one_score / "model.safetensors")["score.weight"]
    torch.testing.assert_close(made.model.score.weight.detach(), head)


def test_a_config_that_says_otherwise_is_not_believed(load, one_score):
    edit(one_score, id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    assert load(one_score).model.score.weight.shape[0] == 1
    change(one_score, score__weight=torch.zeros(3, 32))
    edit(one_score, id2label={"0": "good"}, label2id={"good": 0})
    with pytest.raises(UserError, match=r"has 3 labels, and a score is one number"):
        load(one_score)


def test_a_bias_in_the_file_is_added_where_the_class_has_none(load, places, rollout):
    keys, own = neox_with_bias(places)
    made = load(keys["reward_model"])
    assert made.bias == 3.5
    answer = "Yes."
    ids = made.encode(rollout.prompts[0], answer)
    wanted = own([(rollout.prompts[0].messages, answer)])
    torch.testing.assert_close(made.logits([ids], DEVICE), wanted, atol=1e-5, rtol=1e-5)


def test_weights_that_the_model_has_no_place_for_are_said(load, one_score, capsys):
    load(one_score)
    assert "left out" not in capsys.readouterr().err
    change(one_score, model__layers__2__mlp__up_proj__weight=torch.zeros(64, 32))
    load(one_score)
    err = capsys.readouterr().err
    assert "has weights for model.layers.2.mlp.up_proj.weight, which a Llama" in err
    assert err.count("\n") == 1


def test_two_heads_by_other_names_do_not_pass_for_one(load, one_score):
    """A head of two layers is none that a linear layer could stand for."""
    change(
        one_score,
        score__weight=None,
        value_head__0__weight=torch.zeros(8, 32),
        value_head__2__weight=torch.zeros(1, 8),
    )
    assert find_head(folder_shapes(one_score)) is None
    edit(one_score, id2label={"0": "good"})
    with pytest.raises(UserError, match=r"has no weights for score\.weight"):
        load(one_score)


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_as_the_policys_base_is_said_or_refused(config, one_score, capsys, tied):
    """With tied embeddings nothing is missing, and its head would be dropped without a word."""
    edit(one_score, tie_word_embeddings=tied)
    settings = config(model_name_or_path=str(one_score))
    if tied:
        load_base(settings, DEVICE)
        assert "has weights for score.weight, which a LlamaForCausalLM has" in (
            capsys.readouterr().err
        )
    else:
        with pytest.raises(UserError, match=r"is a classifier \(score.weight\) without lm_head"):
            load_base(settings, DEVICE)


@pytest.fixture
def adapter(places):
    base = AutoModelForCausalLM.from_pretrained(places.model)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(places.out / "a")
    return places.out / "a"


def base_of(places):
    return AutoModelForCausalLM.from_pretrained(places.model)


def test_an_adapters_weights_are_all_there_and_all_taken(places, adapter):
    load_peft_model(base_of(places), str(adapter), "adapter_name_or_path", train=False)
    path = adapter / "adapter_model.safetensors"
    whole = load_file(path)
    first = min(whole)
    save_file({name: x for name, x in whole.items() if name != first}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"has no weights for {first}; its files are not one"):
        load_peft_model(base_of(places), str(adapter), "adapter_name_or_path", train=False)
    strange = first.replace("layers.0", "layers.7")
    save_file({**whole, strange: whole[first].clone()}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"has weights for {strange}, which this model has no"):
        load_peft_model(base_of(places), str(adapter), "adapter_name_or_path", train=False)


def test_a_classifiers_adapter_on_a_language_model_is_not_half_taken(places):
    kind = AutoModelForSequenceClassification
    base = kind.from_pretrained(places.model, num_labels=1)
    settings = LoraConfig(task_type="SEQ_CLS", r=2, modules_to_save=["score"])
    get_peft_model(base, settings).save_pretrained(places.out / "a")
    with pytest.raises(UserError, match=r"score.weight, .*: name it in reward_model_adapters"):
        load_peft_model(base_of(places), str(places.out / "a"), "adapter_name_or_path", train=False)


def test_a_head_of_its_adapter_may_have_one_row_on_a_base_with_two(load, places):
    """The adapter's head stands in the base's place."""
    kind = AutoModelForSequenceClassification
    two = kind.from_pretrained(places.model, num_labels=2)
    two.save_pretrained(places.out / "two")
    tokenizer_of(places).save_pretrained(places.out / "two")
    one = classifier(places)
    settings = LoraConfig(task_type="SEQ_CLS", r=2, modules_to_save=["score"])
    get_peft_model(one, settings).save_pretrained(places.out / "a")
    made = load(places.out / "two", reward_model_adapters=str(places.out / "a"))
    torch.testing.assert_close(made.model.score.weight, one.score.weight, check_device=False)


def test_a_critic_starts_from_a_head_among_its_models_own_weights(places, tiny_roles):
    """As in the files of TRL's models with a value head, and not from 0."""
    keys, _ = trl_value_head(".bin")(places)
    made = tiny_roles(stirred=False, critic="model", critic_model=keys["reward_model"])
    assert made.critic_head.bias.item() == pytest.approx(0.7)
    assert made.critic_head.weight.abs().max() > 0.1


def test_stage_rm_goes_on_with_the_head_of_a_whole_model(places, config):
    """LLaMA-Factory reads the head from the model's folder where there is no adapter."""
    keys, _ = llamafactory_whole(".safetensors")(places)
    settings = config(stage="rm", model_name_or_path=keys["reward_model"])
    assert folder_of_head(settings) == Path(keys["reward_model"])
    assert folder_of_head(config(stage="rm")) is None


def test_an_evaluated_policy_without_one_of_its_weights_is_refused(config, places):
    """transformers would fill it with random numbers, and the evaluation would be of those."""
    folder = places.out / "policy"
    base_of(places).save_pretrained(folder)
    made = build(config(finetuning_type="full", critic="shared"), DEVICE)
    load_policy(made, folder)
    change(folder, lm_head__weight=None, model__norm__weight=None)
    with pytest.raises(UserError, match=r"output_dir: .*policy has no .*weight of the shape"):
        load_policy(made, folder)


def test_an_adapter_by_its_hub_name_is_no_reward_model(config, template, adapter):
    settings = config(reward_model=str(adapter), reward_model_type="full")
    with pytest.raises(UserError, match="is an adapter; name its base here, and the adapter in"):
        load_full(str(adapter), settings, DEVICE, template)


def test_a_name_that_is_neither_folder_nor_hub_name_is_one_line(config, template):
    settings = config(reward_model="no/such/model", reward_model_type="full")
    with pytest.raises(UserError, match="reward_model: no/such/model cannot be loaded"):
        load_full("no/such/model", settings, DEVICE, template)
