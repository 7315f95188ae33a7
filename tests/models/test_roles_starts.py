"""Where policy, reference and critic start, for every way to train them: KL at step 0 is 0."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fastppo import toy
from fastppo.errors import UserError
from fastppo.models.batch import Budget, make_batch
from fastppo.models.load import load_base
from fastppo.models.native_layers import fuse_native_layers
from fastppo.ppo.score import score
from tests.tiny import NAMES, hidden_as, make_config, named, stir


@pytest.fixture
def scored(vowels, rollout):
    return lambda made: score(
        made, rollout, vowels(rollout), temperature=1.0, budget=Budget(rows=4)
    )


BF16 = ["dora", "lora norm,lm_head", "sft with modules_to_save", "freeze shared", "full model"]
# Three ways to add up two adapters round apart; everything else is the same arithmetic.
MERGED_APART = {"ref_model with sft": (1e-5, 0.1)}


# One of a kind: what is adapted, on what it stands, who shares it, and whose model it is.
FAST = [
    "lora",
    "dora",
    "lora reward",
    "sft with modules_to_save",
    "sft two merged",
    "freeze shared",
]
FAST += ["full", "critic other", "ref_model with sft"]


@pytest.mark.parametrize("made", named(NAMES, *FAST), indirect=True)
def test_10_kl_is_0_before_the_first_update(request, made, scored):
    result = scored(made)
    limit, _ = MERGED_APART.get(request.node.callspec.id, (0.0, 0.0))
    assert (result.logprob_N - result.ref_logprob_N).abs().max().item() <= limit
    # The same roles in use, for the price of one: what the table says, and what stays trainable.
    table = {role: count for role, _, count in made.table("one")}
    assert list(table) == ["actor", "reference", "reward", "critic"]
    assert table["reference"] == table["reward"] == 0
    assert table["actor"] > 0
    assert table["critic"] >= made.critic_head.in_features + 1
    trained = {p for role in ("actor", "critic") for p in made.trainable_parameters(role)}
    everything = [p for place in made.places.values() for p in place.model.parameters()]
    for role in made.places:
        with made.use(role):
            assert all(p.requires_grad == (p in trained) for p in everything), role
        assert all(p.requires_grad == (p in trained) for p in everything), role


HALF = [
    *named(NAMES, "sft with modules_to_save", "freeze shared", bf16=True),
    *named(["dora", "full shared"], "dora", fp16=True),
]


@pytest.mark.parametrize("made", HALF, indirect=True)
def test_10_in_16_bits_too_where_what_trains_is_float32_and_the_reference_is_not(
    request, made, scored
):
    result = scored(made)
    _, limit = MERGED_APART.get(request.node.callspec.id, (0.0, 0.0))
    assert (result.logprob_N - result.ref_logprob_N).abs().max().item() <= limit
    for role in ("actor", "critic"):
        assert all(p.dtype == torch.float32 for p in made.trainable_parameters(role))
    reference = made.places["reference"].model
    frozen = [p for n, p in reference.named_parameters() if "lora_" not in n and "_save" not in n]
    assert {p.dtype for p in frozen} == {made.autocast}


@pytest.mark.parametrize("made", named(NAMES, *BF16, "sft merged", "full"), indirect=True)
def test_training_the_actor_leaves_reference_and_critic_where_they_were(made, rollout):
    batch = make_batch(rollout, range(4))
    others = ["reference"] + ([] if made.shares_trunk else ["critic"])
    before = {role: hidden_as(made, role, batch) for role in others}
    with made.use("reference"):
        before_head = made.lm_head.weight_VD.clone()
    actor = hidden_as(made, "actor", batch)
    stir(made.trainable_parameters("actor"), 9)
    assert not torch.equal(hidden_as(made, "actor", batch), actor)
    for role in others:
        assert torch.equal(hidden_as(made, role, batch), before[role])
    with made.use("reference"):
        assert torch.equal(made.lm_head.weight_VD, before_head)


def test_the_reference_of_a_continued_sft_adapter_is_that_adapter_and_the_log_says_so(
    tiny_roles, sft_dirs, model_dir, rollout
):
    made = tiny_roles(stirred=False, adapter_name_or_path=sft_dirs[1])
    batch = make_batch(rollout, range(4))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), sft_dirs[1])
    fuse_native_layers(plain)  # the same kernels, which round alike
    with torch.no_grad():
        expected = plain.get_base_model().model(
            input_ids=batch.input_ids_BT, attention_mask=batch.mask_BT
        )
        base = AutoModelForCausalLM.from_pretrained(model_dir).model(
            input_ids=batch.input_ids_BT, attention_mask=batch.mask_BT
        )
    reference = hidden_as(made, "reference", batch)
    assert torch.equal(reference, expected.last_hidden_state)
    assert not torch.allclose(reference, base.last_hidden_state)
    assert any("LLaMA-Factory's would be the base without it" in note for note in made.notes)


def test_merged_adapters_are_named_for_whoever_loads_what_is_saved(tiny_roles, sft_dirs):
    made = tiny_roles(adapter_name_or_path=",".join(sft_dirs), create_new_adapter=True)
    (note,) = made.notes
    assert "became part of the base" in note
    assert f"adapter_name_or_path: {','.join(sft_dirs)}," in note


def test_a_reward_adapter_on_another_base_than_its_own_is_said_aloud(
    tiny_roles, sft_dirs, reward_dir, tmp_path
):
    shutil.copytree(reward_dir, tmp_path / "reward")
    settings = {"reward_model_type": "lora", "reward_model": str(tmp_path / "reward")}
    merged = {"adapter_name_or_path": sft_dirs[0], "create_new_adapter": True}
    assert not any("can be off" in note for note in tiny_roles(**settings).notes)
    assert any("can be off" in note for note in tiny_roles(**settings, **merged).notes)
    record = tmp_path / "reward" / "fastppo_reward.json"
    record.write_text(json.dumps({"score_at": "eos", "merged": [sft_dirs[0]]}))
    assert not any("can be off" in note for note in tiny_roles(**settings, **merged).notes)
    assert any("can be off" in note for note in tiny_roles(**settings).notes)


def test_34_a_critic_of_its_own_starts_from_the_reward_model(tiny_roles, reward_dir, rollout):
    made = tiny_roles(
        stirred=False,
        critic="model",
        critic_finetuning_type="full",
        reward_model_type="lora",
        reward_model=str(reward_dir),
    )
    batch = make_batch(rollout, range(4))
    torch.testing.assert_close(
        hidden_as(made, "critic", batch), hidden_as(made, "reward", batch), atol=1e-4, rtol=0
    )
    assert torch.equal(made.critic_head.weight, made.reward_heads["reward"].weight)
    assert made.places["critic"].model is not made.model


def test_34_critic_model_brings_the_head_that_lies_in_it(tiny_roles, other_dir, tmp_path):
    folder = tmp_path / "critic"
    shutil.copytree(other_dir, folder)
    tensors = {"v_head.summary.weight": torch.ones(1, 16), "v_head.summary.bias": torch.ones(1)}
    save_file(tensors, folder / "value_head.safetensors")
    made = tiny_roles(stirred=False, critic="model", critic_model=str(folder))
    assert made.critic_head.weight.sum().item() == 16
    save_file(
        {**tensors, "v_head.summary.weight": torch.ones(1, 8)}, folder / "value_head.safetensors"
    )
    with pytest.raises(UserError, match=r"critic_model .*head is for hidden size 8"):
        tiny_roles(critic="model", critic_model=str(folder))


def test_frozen_layers_are_in_memory_once(tiny_roles):
    made = tiny_roles(finetuning_type="freeze", freeze_trainable_layers=1, critic="shared")
    actor = {p.data_ptr() for p in made.model.parameters()}
    copied = [p for p in made.places["reference"].model.parameters() if p.data_ptr() not in actor]
    assert sum(p.numel() for p in copied) == made.table("one")[0][2]


FREEZE = [
    ({"freeze_trainable_layers": 1}, {"layers.1."}),
    ({"freeze_trainable_layers": -1}, {"layers.0."}),
    ({"freeze_trainable_layers": 9}, {"layers.0.", "layers.1."}),
    (
        {"freeze_trainable_layers": 1, "freeze_trainable_modules": "mlp,input_layernorm"},
        {"layers.1.mlp.", "layers.1.input_layernorm."},
    ),
    (
        {"freeze_trainable_layers": 1, "freeze_extra_modules": "norm,lm_head"},
        {"layers.1.", "model.norm.", "lm_head."},
    ),
    ({"freeze_trainable_layers": 0, "freeze_extra_modules": "lm_head"}, {"lm_head."}),
]


@pytest.mark.parametrize(
    ("settings", "expected"),
    FREEZE,
    ids=lambda v: str(v if isinstance(v, dict) else sorted(v))[:60],
)
def test_freeze_means_what_llamafactory_means_by_it(tiny_roles, settings, expected):
    made = tiny_roles(finetuning_type="freeze", **settings)
    names = [name for name, p in made.model.named_parameters() if p.requires_grad]
    assert all(any(part in name for part in expected) for name in names)
    assert all(any(part in name for name in names) for part in expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"finetuning_type": "freeze", "freeze_trainable_modules": "mpl"},
            r"freeze_trainable_modules: this model has no 'mpl' there; it has .*mlp",
        ),
        (
            {"finetuning_type": "freeze", "freeze_extra_modules": "mlp"},
            r"freeze_extra_modules: this model has no 'mlp' there; it has .*norm",
        ),
        ({"additional_target": "head"}, r"additional_target: this model has no module 'head'"),
        ({"flash_attn": "fa2", "bf16": True}, "fa2 needs a CUDA device and there is none"),
    ],
    ids=str,
)
def test_settings_that_only_the_model_shows_wrong(tiny_roles, changes, words):
    with pytest.raises(UserError, match=words):
        tiny_roles(**changes)


def test_tied_embeddings_are_never_untied_in_silence(tiny_roles, tmp_path):
    toy.write_model(tmp_path / "tied", tie_word_embeddings=True)
    model = str(tmp_path / "tied")
    for name in ("lm_head", "embed_tokens"):
        with pytest.raises(UserError, match=f"{name}: this model ties its embeddings"):
            tiny_roles(model_name_or_path=model, additional_target=name)
    made = tiny_roles(model_name_or_path=model)  # lora_target: all
    assert not any("lm_head" in n for n, p in made.model.named_parameters() if p.requires_grad)
    full = tiny_roles(model_name_or_path=model, finetuning_type="full")
    assert full.lm_head.weight_VD is full.base.get_input_embeddings().weight


@pytest.mark.parametrize("adapters", [None, pytest.param("both", marks=pytest.mark.slow)])
def test_a_streamed_reference_model_says_what_it_says_on_the_device(
    tiny_roles, model_dir, sft_dirs, rollout, scored, adapters
):
    settings = {"ref_model": str(model_dir)}
    if adapters is not None:
        settings["ref_model_adapters"] = ",".join(sft_dirs)
    resident, streamed = (tiny_roles(**settings, stream_frozen=is_so) for is_so in (False, True))
    batch = make_batch(rollout, range(4))
    expected = hidden_as(resident, "reference", batch)
    assert torch.equal(hidden_as(streamed, "reference", batch), expected)
    passing = streamed.places["reference"].model.streamed
    assert passing.bytes_moved > 0
    assert not any(p.requires_grad for p in passing.model.parameters())
    homes = {p.host.untyped_storage().data_ptr() for p in passing.packed}
    layers = (w for layer in passing.layers for w in layer.parameters())
    assert all(weight.untyped_storage().data_ptr() in homes for weight in layers)
    assert torch.equal(scored(streamed).ref_logprob_N, scored(resident).ref_logprob_N)


def test_an_adapter_of_another_base_is_refused_in_a_line(tiny_roles, sft_dirs, other_dir):
    with pytest.raises(UserError, match=r"adapter_name_or_path: .*size mismatch.*same base"):
        tiny_roles(model_name_or_path=other_dir, adapter_name_or_path=sft_dirs[0])


def test_a_second_model_with_other_tokens_is_refused(tiny_roles, tmp_path):
    folder = tmp_path / "other"
    toy.write_model(folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"a"', '"\\u0000"'), encoding="utf-8")
    for changes in ({"ref_model": str(folder)}, {"critic": "model", "critic_model": str(folder)}):
        with pytest.raises(UserError, match="has another tokenizer"):
            tiny_roles(**changes)


def test_an_adapter_by_its_hub_name_is_not_taken_for_a_model(tmp_path, sft_dirs):
    """transformers loads the base that it names and puts it there, where nothing merges it."""
    config = make_config(Path(sft_dirs[0]), tmp_path)
    with pytest.raises(UserError, match="is an adapter; name it in adapter_name_or_path"):
        load_base(config, torch.device("cpu"))
