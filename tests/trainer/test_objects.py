"""Roles from objects: PeftModels, critics, references, rewards; and TRL's value heads."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastppo.errors import UserError
from fastppo.models import build as roles
from fastppo.models.value_head import read_value_head
from fastppo.ppo import trainer as loop
from fastppo.types import Rollout
from tests.tiny import make_config, make_rollout, stir
from tests.trainer.conftest import lora

CPU = torch.device("cpu")


class Wrapper(nn.Module):
    """What TRL's AutoModelForCausalLMWithValueHead looks like: its two attributes."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Module()
        self.v_head.summary = nn.Linear(model.config.hidden_size, 1)


@pytest.fixture
def classifier(model_dir):
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1)


def places(made):
    return {role: place.words for role, place in made._state.roles.places.items()}


def test_without_peft_config_all_weights_train_and_the_reference_is_a_copy(trainer, model):
    made = trainer({"max_steps": 1}, peft_config=None)
    assert made.model is model
    before = {name: p.clone() for name, p in model.named_parameters()}
    loop.step_update(made._state)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    reference = made._state.roles.places["reference"].base  # which has the critic's adapter
    found = {name.replace(".base_layer", ""): p for name, p in reference.named_parameters()}
    assert all(torch.equal(found[name], p) for name, p in before.items())


def test_a_peft_model_goes_on_from_its_adapter_and_is_its_own_reference(trainer, model):
    given = get_peft_model(model, lora(r=4))
    stir([p for name, p in given.named_parameters() if "lora_B" in name], 5)
    made = trainer(model=given, peft_config=None)
    assert made.model is given
    assert made.config.lora_rank == 4
    state = loop.step_update(made._state)
    assert state.metrics.rows[0]["kl"] == 0.0, "the reference is the policy at the start"
    state = loop.step_update(state)
    assert state.metrics.rows[1]["kl"] != 0.0


def test_a_new_peft_model_needs_no_copy_of_its_adapter(trainer, model):
    made = trainer(model=get_peft_model(model, lora()), peft_config=None)
    assert places(made)["reference"] == "base, adapters off"


def test_another_adapter_of_a_peft_model_is_the_reference(trainer, model):
    given = get_peft_model(model, lora())
    given.add_adapter("sft", lora())
    made = trainer({"ref_adapter_name": "sft"}, model=given, peft_config=None)
    assert places(made)["reference"] == "base + LoRA 'sft', frozen"
    with pytest.raises(UserError, match="ref_adapter_name: the model has no adapter none"):
        trainer({"ref_adapter_name": "none"}, model=given, peft_config=None)


def test_ref_model_is_a_model_of_its_own(trainer, model_dir):
    reference = AutoModelForCausalLM.from_pretrained(model_dir)
    stir([reference.model.norm.weight], 3, 1.0)
    made = trainer(ref_model=reference)
    assert made._state.roles.places["reference"].base is reference
    assert loop.step_update(made._state).metrics.rows[0]["kl"] != 0.0


def test_a_classifier_is_the_critic_and_its_score_trains(trainer, classifier):
    weight = classifier.score.weight.clone()
    with torch.no_grad():  # V of a state before anything was trained
        wanted = classifier.score(
            classifier.model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state
        )[0, :, 0]
    made = trainer(value_model=classifier)
    built = made._state.roles
    assert not built.shares_trunk
    with built.use("critic"), torch.no_grad():
        found = built.value(built.hidden(torch.tensor([[5, 6, 7]])))[0]
    assert torch.allclose(found, wanted, atol=1e-6)
    loop.step_update(made._state)
    assert not torch.equal(classifier.score.weight, weight), "the given object is what trains"


def test_trl_s_wrapper_is_a_policy_with_its_head_or_a_critic(trainer, model, model_dir):
    wrapper = Wrapper(model)
    made = trainer(model=wrapper)
    assert made._state.roles.shares_trunk
    assert made._state.roles.critic_head is wrapper.v_head.summary
    critic = Wrapper(AutoModelForCausalLM.from_pretrained(model_dir))
    made = trainer(model=AutoModelForCausalLM.from_pretrained(model_dir), value_model=critic)
    assert made._state.roles.places["critic"].base is critic.pretrained_model
    assert made._state.roles.critic_head is critic.v_head.summary


def test_a_reward_model_scores_the_policy_s_own_tokens_at_the_end(trainer, classifier):
    made = trainer(reward_funcs=None, reward_model=classifier)
    template = made._state.template
    rollout: Rollout = make_rollout(["Hi", "Tea?"], [[70, 71, template.eos_id], [80]], template)
    scores, _ = made._state.reward(rollout)
    for row, score in enumerate(scores.tolist()):
        ids = rollout.input_ids_BT[row : row + 1, : rollout.lengths[row]]
        with torch.no_grad():
            alone = classifier.score(classifier.model(input_ids=ids).last_hidden_state)[0, -1, 0]
        assert score == pytest.approx(alone.item(), abs=1e-5)


def test_a_function_and_a_model_add_up_by_weight(trainer, classifier):
    def one(completions, **_):
        return [1.0] * len(completions)

    made = trainer({"reward_weights": [3.0, 0.5]}, reward_funcs=[one], reward_model=classifier)
    row = loop.step_update(made._state).metrics.rows[0]
    (name,) = [key for key in row if key.startswith("reward/") and key != "reward/one"]
    assert row["score"] == pytest.approx(3.0 + 0.5 * row[name], abs=1e-5)


def test_a_classifier_of_two_labels_is_refused(trainer, model_dir):
    two = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=2)
    with pytest.raises(UserError, match=r"reward_model: .* has 2 labels.*num_labels=1"):
        trainer(reward_funcs=None, reward_model=two)


def test_names_in_place_of_objects(trainer, model_dir):
    made = trainer(model=str(model_dir), processing_class=None, reward_funcs="fastppo.toy:vowels")
    assert made.config.model_name_or_path == str(model_dir)
    assert [spec.kind for spec in made.config.rewards] == ["function"]
    loop.step_update(made._state)


def write_trl(model, head, folder, *, adapter):
    """A checkpoint as TRL's wrapper writes it: see PreTrainedModelWrapper.save_pretrained."""
    heads = {f"v_head.summary.{name}": value for name, value in head.state_dict().items()}
    if adapter:
        model.save_pretrained(folder)
        torch.save(heads, folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, state_dict={**model.state_dict(), **heads})


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "PEFT"])
@pytest.mark.parametrize("role", ["critic", "policy", "reward"])
def test_a_checkpoint_of_trl_with_a_value_head_is_read(model, model_dir, tmp_path, adapter, role):
    torch.manual_seed(1)
    head, folder = nn.Linear(32, 1), tmp_path / "trl"
    given = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])) if adapter else model
    if adapter:
        stir([p for name, p in given.named_parameters() if "lora_B" in name], 5)
        given.peft_config["default"].base_model_name_or_path = str(model_dir)
    write_trl(given, head, folder, adapter=adapter)
    with torch.no_grad():
        inner = given.base_model.model.model if adapter else given.model
        wanted = head(inner(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state)[0, :, 0]
    changes = {
        "critic": {
            "critic": "model",
            "critic_model": str(folder),
            "critic_finetuning_type": "full",
        },
        "policy": {
            "critic": "shared",
            "value_head_init": "model",
            **({"adapter_name_or_path": str(folder)} if adapter else {}),
        },
        "reward": {
            "reward_model": str(folder),
            "reward_model_type": "lora" if adapter else "full",
        },
    }[role]
    base = str(folder) if role == "policy" and not adapter else str(model_dir)
    if not adapter:
        from fastppo.toy import byte_tokenizer

        byte_tokenizer().save_pretrained(folder)
    settings = make_config(model_dir, tmp_path, **{**changes, "model_name_or_path": base})
    if role == "reward" and not adapter:
        from fastppo.rewards.model import load_full
        from fastppo.templates import get_template

        reward = load_full(str(folder), settings, CPU, get_template("chatml", byte_tokenizer()))
        assert torch.equal(reward.head.weight, head.weight)
        return
    made = roles.build(settings, CPU)
    name = "reward" if role == "reward" else "critic"
    with made.use(name), torch.no_grad():
        hidden = made.hidden(torch.tensor([[5, 6, 7]]))
        found = (
            made.reward_heads["reward"](hidden)[..., 0] if name == "reward" else made.value(hidden)
        )
    assert torch.allclose(found[0], wanted, atol=1e-5)


@pytest.mark.parametrize("tuning", ["shared LoRA", "critic LoRA", "full"])
def test_the_critic_is_written_as_trl_writes_it(trainer, tmp_path, tuning, model_dir):
    args = {"critic": "adapter" if tuning == "critic LoRA" else "shared"}
    made = trainer(args, peft_config=None if tuning == "full" else lora())
    state = loop.step_update(made._state)
    folder = tmp_path / "trl"
    made.save_value_model(folder)
    weight, _ = read_value_head(folder, "critic_model")
    assert torch.equal(weight, state.roles.critic_head.weight)
    ids = torch.tensor([[5, 6, 7]])
    with state.roles.use("critic"), torch.no_grad():
        wanted = state.roles.hidden(ids)
    if tuning == "full":
        names = load_file(folder / "model.safetensors").keys()
        assert {"v_head.summary.weight", "v_head.summary.bias"} <= names
        plain = AutoModelForCausalLM.from_pretrained(folder)
    else:
        heads = torch.load(folder / "pytorch_model.bin", weights_only=True)
        assert set(heads) == {"v_head.summary.weight", "v_head.summary.bias"}
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), folder)
        plain = plain.get_base_model()
    with torch.no_grad():
        found = plain.model(input_ids=ids).last_hidden_state
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_tokenizer_that_was_given_is_not_changed(trainer, model_dir):
    from transformers import AutoTokenizer

    given = AutoTokenizer.from_pretrained(model_dir)
    before = (given.chat_template, given.eos_token, copy.copy(given.pad_token))
    trainer(processing_class=given)
    assert (given.chat_template, given.eos_token, given.pad_token) == before
