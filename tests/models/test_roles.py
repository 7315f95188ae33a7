"""Roles: which adapter runs, and that switching leaves what trains as it was."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from fastppo.errors import UserError
from fastppo.models.batch import make_batch
from fastppo.models.native_layers import fuse_native_layers
from fastppo.models.value_head import load_value_head
from fastppo.run import save
from tests.tiny import hidden_as


def trains(made):
    return {name for name, p in made.model.named_parameters() if p.requires_grad}


def test_two_roles_train_and_two_do_not(tiny_roles, reward_dir):
    made = tiny_roles(reward_model_type="lora", reward_model=str(reward_dir), critic="adapter")
    counts = {role: count for role, _, count in made.table("one")}
    assert counts["reference"] == counts["reward"] == 0
    assert counts["actor"] > 0
    assert counts["critic"] == counts["actor"] + made.critic_head.in_features + 1


def test_10_reference_is_the_base_with_no_adapter_at_all(tiny_roles, model_dir, rollout):
    made = tiny_roles()
    batch = make_batch(rollout, range(4))
    base = AutoModelForCausalLM.from_pretrained(model_dir).model
    fuse_native_layers(base)  # the same kernels, which round alike
    expected = base(input_ids=batch.input_ids_BT, attention_mask=batch.mask_BT).last_hidden_state
    assert torch.equal(hidden_as(made, "reference", batch), expected.detach())
    assert not torch.equal(hidden_as(made, "actor", batch), expected.detach())


def test_10_a_new_adapter_gives_the_references_log_probs(tiny_roles, rollout):
    made = tiny_roles(stirred=False)
    batch = make_batch(rollout, range(4))
    assert torch.equal(hidden_as(made, "reference", batch), hidden_as(made, "actor", batch))


@pytest.mark.parametrize("role", ["reference", "reward", "critic", "actor"])
def test_11_switching_roles_stops_nothing_from_training(tiny_roles, reward_dir, role):
    made = tiny_roles(reward_model_type="lora", reward_model=str(reward_dir), critic="adapter")
    before = trains(made)
    assert any(".default." in name for name in before)
    assert any(".critic." in name for name in before)
    assert not any(".reward." in name for name in before)
    with made.use(role):
        assert trains(made) == before
    assert trains(made) == before


def test_11_a_role_that_is_on_is_not_switched_on_again(tiny_roles, monkeypatch):
    """PEFT goes over all modules for it."""
    made, switched = tiny_roles(critic="shared"), []
    inner = type(made)._switch

    def switch(self, place):
        switched.append(place.adapter)
        inner(self, place)

    monkeypatch.setattr(type(made), "_switch", switch)
    with made.use("actor"), made.use("critic"), made.use("actor"):
        pass
    assert switched == []
    with made.use("reference"):
        pass
    assert switched == [None, "default"]


def test_11_a_switch_that_a_signal_interrupted_is_made_anew(tiny_roles, rollout, monkeypatch):
    made = tiny_roles()
    batch = make_batch(rollout, [1])
    actor = hidden_as(made, "actor", batch)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Parameter, "requires_grad_", interrupt)  # adapters are off by then
        with pytest.raises(KeyboardInterrupt), made.use("reference"):
            pass
    assert torch.equal(hidden_as(made, "actor", batch), actor)


def test_11_roles_nest_and_come_back_after_an_error(tiny_roles, rollout):
    made = tiny_roles()
    batch = make_batch(rollout, [1])
    actor = hidden_as(made, "actor", batch)
    with pytest.raises(RuntimeError), made.use("reference"), made.use("critic"):
        raise RuntimeError
    with torch.no_grad():
        assert torch.equal(made.hidden(batch.input_ids_BT, batch.mask_BT), actor)


def gradients(made, batch, role):
    made.model.zero_grad(set_to_none=True)
    with made.use(role):
        made.hidden(batch.input_ids_BT, batch.mask_BT).square().sum().backward()
    return {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", [("actor", "critic"), ("critic", "actor")])
def test_09_checkpointing_changes_no_gradient(tiny_roles, rollout, order):
    batch = make_batch(rollout, range(4))
    found = []
    for plain in (True, False):
        made = tiny_roles(disable_gradient_checkpointing=plain, critic="adapter")
        made.model.train()
        found.append([gradients(made, batch, role) for role in order])
    for with_it, without in zip(*found, strict=True):
        assert with_it.keys() == without.keys()
        assert all(torch.equal(with_it[name], without[name]) for name in with_it)


def test_09_checkpointing_recomputes_in_training_and_not_in_scoring(tiny_roles, rollout):
    made = tiny_roles(disable_gradient_checkpointing=False)
    batch = make_batch(rollout, [1])
    calls = []
    layer = made.trunk.layers[0].mlp
    # Before and not after: recomputation stops early, within the last module of the layer.
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    made.model.eval()
    hidden_as(made, "actor", batch)
    assert len(calls) == 1
    calls.clear()
    made.model.train()
    made.hidden(batch.input_ids_BT, batch.mask_BT).sum().backward()
    assert len(calls) == 2


def test_08_no_dropout_is_left_alive(model_dir, tiny_roles, rollout, tmp_path):
    from fastppo import toy

    folder = tmp_path / "dropping"
    toy.write_model(folder, attention_dropout=0.5)
    made = tiny_roles(model_name_or_path=str(folder))
    made.model.train()
    batch = make_batch(rollout, range(4))
    assert torch.equal(hidden_as(made, "actor", batch), hidden_as(made, "actor", batch))


def test_lora_layers_puts_adapters_on_the_upper_layers_only(tiny_roles):
    made = tiny_roles(lora_layers=1)
    names = [name for name in trains(made) if ".default." in name]
    assert names
    assert all(".layers.1." in name for name in names)


def test_all_linears_leave_the_output_head_alone(tiny_roles):
    assert not any("lm_head" in name for name in trains(tiny_roles()))


def test_an_unknown_lora_target_names_what_there_is(tiny_roles):
    with pytest.raises(UserError, match=r"no linear layer 'q_prj'.*q_proj"):
        tiny_roles(lora_target="q_prj")
    with pytest.raises(UserError, match=r"lora_target: lm_head: the output head takes no adapter"):
        tiny_roles(lora_target="q_proj,lm_head")


def test_47_plain_peft_loads_what_is_saved(tiny_roles, model_dir, tokenizer, rollout, tmp_path):
    made = tiny_roles(critic="adapter")
    save.save_model(made.model, made.critic_head, tokenizer, tmp_path / "saved")
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "saved")).eval()
    fuse_native_layers(plain)  # the same kernels, which round alike
    batch = make_batch(rollout, range(4))
    with torch.no_grad():
        expected = plain.get_base_model().model(
            input_ids=batch.input_ids_BT, attention_mask=batch.mask_BT
        )
    assert torch.equal(hidden_as(made, "actor", batch), expected.last_hidden_state)
    head = load_value_head(tmp_path / "saved", 32, torch.device("cpu"))
    assert torch.equal(head.weight, made.critic_head.weight)


def test_34_the_critic_starts_from_the_reward_model(tiny_roles, reward_dir, rollout):
    made = tiny_roles(
        stirred=False, reward_model_type="lora", reward_model=str(reward_dir), critic="adapter"
    )
    batch = make_batch(rollout, range(4))
    assert torch.equal(hidden_as(made, "critic", batch), hidden_as(made, "reward", batch))
    assert torch.equal(made.critic_head.weight, made.reward_heads["reward"].weight)


def test_34_the_critic_starts_from_zero_if_asked(tiny_roles, reward_dir):
    made = tiny_roles(
        stirred=False,
        reward_model_type="lora",
        reward_model=str(reward_dir),
        critic="adapter",
        value_head_init="zeros",
    )
    assert not made.critic_head.weight.any()


def test_bf16_runs_its_gemms_in_bf16(tiny_roles, rollout):
    made = tiny_roles(bf16=True)
    batch = make_batch(rollout, range(4))
    dtypes, products = [], ("aten.mm.default", "aten.addmm.default", "aten.addmm_.default")

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), settings=None):
            if str(function) in products:
                dtypes.extend(argument.dtype for argument in arguments)
            return function(*arguments, **(settings or {}))

    with Products():
        hidden_as(made, "actor", batch)
    # A base's, A's and B's, in seven layers of each block.
    assert len(dtypes) >= 7 * made.base.config.num_hidden_layers * 3 * 2
    assert set(dtypes) == {torch.bfloat16}
