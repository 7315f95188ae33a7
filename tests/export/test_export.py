"""fastppo-export: plain transformers loads what it writes, and says the same."""

from __future__ import annotations

import json
import shutil
from itertools import product

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from fastppo.export.cli import main
from fastppo.models.batch import Budget
from fastppo.models.value_head import load_value_head
from fastppo.ppo import trainer
from fastppo.rewards.adapter import AdapterReward
from fastppo.rewards.model import load_full
from tests.tiers import slow_unless
from tests.tiny import PROMPTS, stir

NEAR = {"atol": 1e-4, "rtol": 1e-4}  # float32, merged in another order
WEIGHTS = "adapter_model.safetensors"
ANSWERS = ["aeiou", "Yes, of course it is.", "x", "That is what it was then."]


@pytest.fixture
def policy_dir(state, tmp_path):
    """What stage ppo leaves, the adapter far from 0."""
    made = state(critic="shared")
    stir(made.roles.trainable_parameters("actor"), 3)
    trainer.checkpoint.save(made, tmp_path / "policy")
    return tmp_path / "policy"


def test_a_policy_becomes_the_model_that_its_adapter_makes_of_the_base(
    policy_dir, model_dir, tmp_path, rollout, capsys
):
    assert main([str(policy_dir), str(tmp_path / "out")]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    wanted = PeftModel.from_pretrained(base, str(policy_dir)).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with torch.no_grad():
        ids = rollout.input_ids_BT
        torch.testing.assert_close(merged(ids).logits, wanted(ids).logits, **NEAR)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template
    assert tokenizer.eos_token_id in merged.generation_config.eos_token_id


def test_llamafactorys_keys_from_a_file_with_shards_of_a_size(
    policy_dir, model_dir, tmp_path, capsys
):
    config = {
        "model_name_or_path": str(model_dir),
        "adapter_name_or_path": str(policy_dir),
        "template": "chatml",
        "finetuning_type": "lora",
        "export_dir": str(tmp_path / "out"),
        "export_size": 5,
        "export_device": "cpu",
        "export_legacy_format": False,
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    assert main([str(tmp_path / "merge.yaml"), "infer_dtype=bfloat16"]) == 0
    assert "'finetuning_type' means nothing to an export" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_adapters_that_were_merged_below_come_along(state, sft_dirs, tmp_path, rollout):
    """An adapter on a merged base is wrong on the base alone, and nothing would say so."""
    below = ",".join(sft_dirs[:1])
    made = state(critic="shared", adapter_name_or_path=below, create_new_adapter=True)
    stir(made.roles.trainable_parameters("actor"), 3)
    trainer.checkpoint.save(made, tmp_path / "policy")
    assert main([str(tmp_path / "policy"), str(tmp_path / "out")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids, mask = rollout.input_ids_BT, torch.ones_like(rollout.input_ids_BT)
    with torch.no_grad(), made.roles.use("actor"):
        wanted = made.roles.hidden(ids, mask)
        torch.testing.assert_close(exported.model(ids).last_hidden_state, wanted, **NEAR)


@pytest.fixture
def scores_of(tiny_roles, template, lay_out, tokenizer):
    """Our own scores of ANSWERS to PROMPTS, by the adapter in a folder."""

    def make(folder):
        made = tiny_roles(reward_model=str(folder), reward_model_type="lora")
        answers = [template.encode_response(text) for text in ANSWERS]
        rollout = lay_out(PROMPTS, answers)
        object.__setattr__(rollout, "texts", ANSWERS)
        return rollout, AdapterReward(made, folder, template, Budget(rows=4))(rollout)

    return make


def classified(folder, how):
    """The exported classifier's scores, as anybody would ask for them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": ask}, {"role": "assistant", "content": said}],
            tokenize=False,
        )
        for ask, said in zip(PROMPTS, ANSWERS, strict=True)
    ]
    settings = {"return_tensors": "pt", "add_special_tokens": False}
    with torch.no_grad():
        if how == "right-padded":
            return model(**tokenizer(texts, padding=True, **settings)).logits[:, 0]
        return torch.cat([model(**tokenizer(text, **settings)).logits[0] for text in texts])


@pytest.mark.parametrize(
    ("score_at", "how"),
    slow_unless(
        lambda score_at, how: (score_at == "eos") == (how == "right-padded"),
        product(["eos", "suffix"], ["single", "right-padded"]),
    ),
)
def test_a_reward_model_becomes_a_classifier_with_its_scores(
    reward_dir, tmp_path, scores_of, how, score_at, capsys
):
    """Read at EOS as fastppo trains it, and behind it as LLaMA-Factory does."""
    folder = tmp_path / "reward"
    shutil.copytree(reward_dir, folder)
    if score_at == "suffix":
        (folder / "fastppo_reward.json").unlink()
    assert main([str(folder), str(tmp_path / "out"), "stage=rm", "template=chatml"]) == 0
    bias = load_value_head(folder, 32, torch.device("cpu")).bias.item()
    assert f"{bias:+.6g}" in capsys.readouterr().out
    _, wanted = scores_of(folder)
    torch.testing.assert_close(classified(tmp_path / "out", how) + bias, wanted, **NEAR)


def test_as_a_full_reward_the_exported_classifier_is_the_adapter_bias_and_all(
    reward_dir, tmp_path, scores_of, config, template
):
    assert main([str(reward_dir), str(tmp_path / "out")]) == 0
    rollout, wanted = scores_of(reward_dir)
    settings = config(reward_model=str(tmp_path / "out"), reward_model_type="full")
    full = load_full(str(tmp_path / "out"), settings, torch.device("cpu"), template)
    torch.testing.assert_close(full(rollout), wanted, **NEAR)


def test_a_pad_token_that_ends_conversations_is_not_the_classifiers(
    reward_dir, tmp_path, scores_of
):
    """Llama 3 pads with EOS; a classifier would skip the very token where it is read."""
    folder = tmp_path / "reward"
    shutil.copytree(reward_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    _, wanted = scores_of(folder)
    assert main([str(folder), str(tmp_path / "out")]) == 0
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.pad_token_id != exported.eos_token_id
    bias = load_value_head(folder, 32, torch.device("cpu")).bias.item()
    found = classified(tmp_path / "out", "right-padded") + bias
    torch.testing.assert_close(found, wanted, **NEAR)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def test_an_export_into_a_folder_of_the_input_leaves_the_input_as_it_was(policy_dir, tmp_path):
    before = files(policy_dir)
    assert main([str(policy_dir), str(policy_dir / "merged")]) == 0
    shutil.move(policy_dir / "merged", tmp_path / "out")
    assert files(policy_dir) == before
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_adapter_that_is_not_finite_is_not_merged(policy_dir, tmp_path, capsys):
    """PEFT finds it out in the middle of merging."""
    weights = load_file(policy_dir / WEIGHTS)
    save_file({name: x * torch.nan for name, x in weights.items()}, policy_dir / WEIGHTS)
    assert main([str(policy_dir), str(tmp_path / "new" / "out")]) == 2
    error = capsys.readouterr().err
    assert f"the adapter in {policy_dir} cannot be merged (its weights are not finite)" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_another_base_than_the_adapter_names_is_said(policy_dir, model_dir, tmp_path, capsys):
    """It may be the same model at another place, and it may not."""
    shutil.copytree(model_dir, tmp_path / "base")
    base = f"model_name_or_path={tmp_path}/base"
    assert main([str(policy_dir), str(tmp_path / "out"), base]) == 0
    line = f"note: {policy_dir} was trained on {model_dir}, and is merged into {tmp_path}/base"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device"), 1, "stopped: no room to write"),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), 1, "stopped: no room"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["disk", "quota", "Ctrl-C"],
)
def test_half_an_export_is_left_by_nothing(
    policy_dir, tmp_path, capsys, monkeypatch, error, code, words
):
    """And the same command works once there is room."""

    def fails(self, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    arguments = [str(policy_dir), str(tmp_path / "new" / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", fails)
        assert main(arguments) == code
    said = capsys.readouterr().err
    assert f"fastppo-export: {words}" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert main(arguments) == 0


def test_what_an_export_that_was_killed_has_left_is_in_no_ones_way(policy_dir, tmp_path):
    (tmp_path / "out" / ".export.partial").mkdir(parents=True)
    (tmp_path / "out" / ".export.partial" / "model.safetensors").write_bytes(b"half")
    assert main([str(policy_dir), str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / ".export.partial").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_gpu_without_room_is_told_to_do_without(policy_dir, tmp_path, capsys, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("fastppo.export.model.merge_adapters", no_room)
    assert main([str(policy_dir), str(tmp_path / "out")]) == 1
    assert "out of memory on the GPU (CUDA out of memory.); set export_device: cpu" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
