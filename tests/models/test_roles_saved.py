"""What is written loads in plain PEFT and plain transformers, and a run goes on from it."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo import toy
from fastppo.errors import UserError
from fastppo.models.batch import make_batch
from fastppo.models.load import trunk
from fastppo.models.value_head import load_value_head
from fastppo.ppo import checkpoint, trainer
from fastppo.run import durable
from tests.tiny import hidden_as, settings_of, stir

KINDS = ["lora", "dora", "rslora", "sft with modules_to_save", "sft two", "freeze", "full shared"]
KINDS += ["full", "full model", "freeze model", "critic full reward", "critic other"]
FEW = ["sft with modules_to_save", "sft two", "full shared", "freeze model", "critic other"]


def plain(folder, base):
    """The folder as somebody without fastppo loads it, onto `base` where it is an adapter."""
    if (folder / "adapter_config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(base)
        return PeftModel.from_pretrained(model, str(folder)).eval()
    return AutoModelForCausalLM.from_pretrained(folder)


def hidden_of(model, batch):
    with torch.no_grad():
        return trunk(model)(
            input_ids=batch.input_ids_BT, attention_mask=batch.mask_BT
        ).last_hidden_state


@pytest.fixture
def named(config, sft_dirs, model_dir, other_dir, reward_dir):
    """The configuration of a combination by its name."""

    def make(name, **changes):
        return config(**settings_of(name, sft_dirs, model_dir, other_dir, reward_dir), **changes)

    return make


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Up to rounding: the fused layer multiplies by the scaling in another order than PEFT does."""
    limit = 32 * torch.finfo(ours.dtype).eps * theirs.abs().max()
    return bool((ours - theirs).abs().max() <= limit)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FEW else pytest.mark.slow) for kind in KINDS]
)
def test_47_actor_and_critic_load_without_fastppo(
    named, kind, rollout, tmp_path, model_dir, other_dir, sft_dirs
):
    state = trainer.init_state(named(kind))
    made = state.roles
    for seed, role in enumerate(("actor", "critic")):
        stir(made.trainable_parameters(role), seed)
    folder = tmp_path / "saved"
    checkpoint.save(state, folder)
    batch = make_batch(rollout, range(4))
    base = model_dir
    if kind == "sft two":  # on top of the adapter that was merged
        base = tmp_path / "merged"
        first = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model_dir), sft_dirs[0]
        )
        first.merge_and_unload().save_pretrained(base)
    actor = plain(folder, base)
    assert same(hidden_of(actor, batch), hidden_as(made, "actor", batch))
    with torch.no_grad():
        logits = actor(input_ids=batch.input_ids_BT).logits
        own = made.model(input_ids=batch.input_ids_BT).logits
    assert same(logits, own)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == state.tokenizer.get_vocab()
    head = load_value_head(folder, made.critic_head.in_features, torch.device("cpu"))
    assert torch.equal(head.weight, made.critic_head.weight)
    assert (folder / "critic").exists() != made.shares_trunk
    if not made.shares_trunk:
        base = other_dir if kind == "critic other" else base
        critic = plain(folder / "critic", base)
        assert same(hidden_of(critic, batch), hidden_as(made, "critic", batch))
        assert (folder / "critic" / "value_head.safetensors").is_file()


@pytest.mark.parametrize(("kind", "whole"), [("lora grpo", False), ("full rloo", True)])
def test_without_a_critic_none_is_built_trained_or_saved(named, kind, whole, tmp_path):
    settings = named(kind, disable_gradient_checkpointing=False)
    state = trainer.init_state(settings)
    made = state.roles
    assert "critic" not in made.places
    assert made.critic_head is None
    assert made.table("one")[-1] == ("critic", "none", 0)
    before = [p.detach().clone() for p in made.trainable_parameters("actor")]
    state = trainer.step_update(state)
    moved = [
        not torch.equal(a, b)
        for a, b in zip(made.trainable_parameters("actor"), before, strict=True)
    ]
    assert any(moved)
    assert "value_loss" not in state.metrics.rows[0]
    checkpoint.save_to_resume(state, tmp_path)
    folder = tmp_path / "checkpoint-1"
    assert (folder / "model.safetensors").is_file() == whole
    assert (folder / "adapter_model.safetensors").is_file() != whole
    assert not (folder / "value_head.safetensors").exists()
    assert not (folder / "critic").exists()
    resumed = trainer.init_state(settings)
    checkpoint.resume(resumed, folder)
    pairs = zip(
        checkpoint.trainable_parameters(resumed),
        checkpoint.trainable_parameters(state),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["full shared", "freeze"])
def test_a_bf16_run_saves_bf16_whatever_trains_in_float32(named, kind, tmp_path):
    state = trainer.init_state(named(kind, bf16=True))
    checkpoint.save(state, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["dtype"] == "bfloat16"
    assert saved.get("use_cache", True) is True
    assert saved["attention_dropout"] == 0.0
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert next(iter(state.roles.trainable_parameters("actor"))).dtype == torch.float32


def test_a_full_folder_of_tied_embeddings_stays_tied_and_keeps_its_dropout(config, tmp_path):
    toy.write_model(tmp_path / "tied", tie_word_embeddings=True, attention_dropout=0.25)
    tied = {"model_name_or_path": str(tmp_path / "tied"), "finetuning_type": "full"}
    state = trainer.init_state(config(critic="shared", bf16=True, **tied))
    checkpoint.save(state, tmp_path / "saved")
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.config.attention_dropout == 0.25


def test_a_saved_critic_is_the_next_runs_critic_model(named, config, tmp_path, rollout):
    state = trainer.init_state(named("critic full reward"))
    checkpoint.save(state, tmp_path / "saved")
    again = trainer.init_state(config(
        critic="model", critic_model=str(tmp_path / "saved" / "critic"),
        critic_finetuning_type="full",
    )).roles  # fmt: skip
    batch = make_batch(rollout, range(4))
    assert torch.equal(hidden_as(again, "critic", batch), hidden_as(state.roles, "critic", batch))
    assert torch.equal(again.critic_head.weight, state.roles.critic_head.weight)


RESUMED = ["lora norm,lm_head", "sft with modules_to_save", "dora", "freeze", "full shared"]
RESUMED += ["full model", "critic other", "critic full reward", "full ref_model"]
FAST = ["sft with modules_to_save", "full model"]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in RESUMED],
)
def test_19_a_resumed_run_is_the_unbroken_one_bit_for_bit(named, kind, tmp_path):
    def start(name):
        return trainer.init_state(
            named(
                kind,
                metrics_dir=str(tmp_path / name),
                max_steps=2,
                lr_scheduler_type="cosine",
                disable_gradient_checkpointing=False,
            )
        )

    straight = trainer.step_update(start("straight"))
    checkpoint.save_to_resume(straight, tmp_path)
    straight = trainer.step_update(straight)
    resumed = start("resumed")
    checkpoint.resume(resumed, durable.checkpoints(tmp_path)[-1])
    resumed = trainer.step_update(resumed)
    for name in ("score", "kl", "policy_loss", "value_loss", "grad_norm_actor", "entropy"):
        assert resumed.metrics.rows[-1][name] == straight.metrics.rows[-1][name]
    assert straight.metrics.rows[0]["kl"] == 0.0
    pairs = zip(
        checkpoint.trainable_parameters(resumed),
        checkpoint.trainable_parameters(straight),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_resuming_with_another_finetuning_type_is_refused(named, tmp_path):
    checkpoint.save_to_resume(trainer.step_update(trainer.init_state(named("lora"))), tmp_path)
    full = trainer.init_state(named("full"))
    with pytest.raises(UserError, match=r"other shapes; keep lora_rank.*finetuning_type"):
        checkpoint.resume(full, tmp_path / "checkpoint-1")
