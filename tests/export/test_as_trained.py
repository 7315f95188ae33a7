"""What is exported is what was trained: its text, its base, its padding."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fastppo.cli import main as train
from fastppo.export.cli import main
from fastppo.models.load import trunk
from fastppo.ppo import trainer
from fastppo.templates import get_template
from tests.tiers import slow_unless
from tests.tiny import stir

OWN_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = [{"role": "user", "content": "Word 1"}]


@pytest.fixture
def base(model_dir, tmp_path):
    """A model like Qwen1.5: its own chat template has a system prompt of its own."""
    folder = tmp_path / "base"
    shutil.copytree(model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = OWN_SYSTEM
    tokenizer.save_pretrained(folder)
    return folder


def train_reward(base, folder, monkeypatch, **keys):
    monkeypatch.chdir(base.parent)
    pairs = [{"instruction": f"Word {i}", "chosen": "a" * i, "rejected": "x"} for i in range(1, 5)]
    (base.parent / "pairs.json").write_text(json.dumps(pairs))
    settings = {
        "stage": "rm",
        "model_name_or_path": str(base),
        "dataset": "pairs.json",
        "template": "qwen",
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 2,
        **keys,
    }
    (base.parent / "rm.yaml").write_text(yaml.safe_dump(settings))
    assert train(["rm.yaml"]) == 0


def trained_score(base, folder, template, system, answer):
    """The value head on the text that stage rm made of the conversation."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    head = load_file(folder / "value_head.safetensors")
    ids = template.encode_prompt(ASKED, system) + template.encode_response(answer)
    with torch.no_grad():
        hidden = trunk(model)(torch.tensor([ids])).last_hidden_state[0, -1]
    return (hidden @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"][0]).item()


def exported_score(folder, answer):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    chat = [*ASKED, {"role": "assistant", "content": answer}]
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        return model(ids).logits.item()


@pytest.mark.parametrize(
    "keys",
    slow_unless(
        lambda keys: "enable_thinking" in keys,
        [
            {},
            {"default_system": "Be brief."},
            {"template": None},
            {"template": None, "default_system": "Be brief."},
            {"template": "qwen3", "enable_thinking": False},
            {"template": "empty"},
            {"template": "default"},
        ],
    ),
    ids=str,
)
def test_an_exported_reward_models_score_is_the_one_that_was_trained(
    base, tmp_path, monkeypatch, keys, capsys
):
    reward, out = tmp_path / "reward", tmp_path / "out"
    train_reward(base, reward, monkeypatch, **keys)
    assert main([str(reward), str(out)]) == 0
    name = keys.get("template", "qwen")
    quick = {"enable_thinking": False} if "enable_thinking" in keys else {}
    template = get_template(name, AutoTokenizer.from_pretrained(base), **quick)
    for answer in ("aaa", "Yes, it is."):
        wanted = trained_score(base, reward, template, keys.get("default_system"), answer)
        assert exported_score(out, answer) == pytest.approx(wanted, abs=1e-4)
    if quick:
        assert "serve it without enable_thinking" in capsys.readouterr().out


def test_the_bias_of_a_head_does_not_drift_in_training(base, tmp_path, monkeypatch):
    """The loss is of differences: what moved the bias was the rounding of a gradient of 0."""
    train_reward(base, tmp_path / "reward", monkeypatch)
    head = load_file(tmp_path / "reward" / "value_head.safetensors")
    assert head["v_head.summary.bias"].item() == 0.0
    assert head["v_head.summary.weight"].abs().max() > 0


def test_what_training_saves_is_served_with_its_own_text(state, tmp_path):
    """Without an export too: whoever loads adapter and tokenizer asks in the text of training."""
    made = state(critic="shared", default_system="Be brief.")
    trainer.checkpoint.save(made, tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    how = {"add_generation_prompt": True, "return_dict": False}
    wanted = made.template.encode_prompt(ASKED, "Be brief.")
    assert tokenizer.apply_chat_template(ASKED, **how) == wanted
    record = json.loads((tmp_path / "policy" / "fastppo_template.json").read_text())
    assert record == {
        "template": "chatml",
        "default_system": "Be brief.",
        "enable_thinking": True,
        "preserve_thinking": False,
    }


def test_a_folder_without_a_record_takes_the_texts_keys_from_the_file(
    state, tmp_path, capsys, model_dir
):
    """LLaMA-Factory's adapters record nothing; its export files carry the keys of training."""
    made = state(critic="shared")
    trainer.checkpoint.save(made, tmp_path / "policy")
    (tmp_path / "policy" / "fastppo_template.json").unlink()
    keys = ["template=qwen3", "enable_thinking=false", "default_system=Be brief."]
    assert main([str(tmp_path / "policy"), str(tmp_path / "out"), *keys]) == 0
    out = capsys.readouterr().out
    assert "the chat template is now the training's (template: qwen3)" in out
    assert '{"enable_thinking": false}' in out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    template = get_template(
        "qwen3", AutoTokenizer.from_pretrained(model_dir), enable_thinking=False
    )
    how = {"add_generation_prompt": True, "return_dict": False}
    assert tokenizer.apply_chat_template(ASKED, **how) == template.encode_prompt(ASKED, "Be brief.")


@pytest.fixture
def on_top(state, sft_dirs, tmp_path):
    """A policy that was trained on the base with an SFT adapter merged into it."""
    made = state(critic="shared", adapter_name_or_path=sft_dirs[0], create_new_adapter=True)
    stir(made.roles.trainable_parameters("actor"), 3)
    trainer.checkpoint.save(made, tmp_path / "policy")
    return tmp_path / "policy"


def merge_file(tmp_path, base, adapters):
    config = {
        "model_name_or_path": str(base),
        "adapter_name_or_path": str(adapters),
        "template": "chatml",
        "export_dir": str(tmp_path / "out"),
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    return [str(tmp_path / "merge.yaml")]


def test_a_merge_file_that_names_the_policy_alone_merges_what_it_was_trained_on(
    on_top, sft_dirs, model_dir, tmp_path, rollout, capsys
):
    assert main(merge_file(tmp_path, model_dir, on_top)) == 0
    assert f"with {sft_dirs[0]} merged into it" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    for folder in (sft_dirs[0], on_top):
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = rollout.input_ids_BT
    with torch.no_grad():
        wanted, found = (m.eval()(ids).logits.log_softmax(-1) for m in (model, exported))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["another base", "no folder", "another order"])
def test_a_merge_on_another_base_than_the_recorded_is_refused(
    on_top, sft_dirs, model_dir, tmp_path, capsys, case
):
    base, names, words = model_dir, str(on_top), f"adapter_name_or_path: {sft_dirs[0]},{on_top}"
    if case == "another base":
        base = tmp_path / "base"
        shutil.copytree(model_dir, base)
    elif case == "no folder":
        record = on_top / "fastppo_base.json"
        record.write_text(json.dumps({"merged": ["/nowhere/at/all/sft"]}))
        words = "there is no folder /nowhere/at/all/sft here"
    else:
        names = f"{on_top},{on_top}"
        (tmp_path / "sub").mkdir()
        words = "was trained on"
        base = tmp_path / "base"
        shutil.copytree(model_dir, base)
    assert main(merge_file(tmp_path, base, names)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "out").exists()
    if case == "another base":  # the cure
        assert main(merge_file(tmp_path, base, f"{sft_dirs[0]},{on_top}")) == 0


def test_a_pad_token_without_a_row_pads_no_export(state, tmp_path, model_dir):
    """[PAD] was added to the tokenizer and not to the model: a batch of two would index past it."""
    made = state(critic="shared")
    trainer.checkpoint.save(made, tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "policy")
    (tmp_path / "policy" / "fastppo_reward.json").write_text(json.dumps({"score_at": "eos"}))
    rows = AutoModelForCausalLM.from_pretrained(model_dir).config.vocab_size
    for stage in ("ppo", "rm"):
        out = tmp_path / stage
        assert main([str(tmp_path / "policy"), str(out), f"stage={stage}"]) == 0
        if stage == "ppo":
            model = AutoModelForCausalLM.from_pretrained(out)
            assert model.generation_config.pad_token_id < rows
        else:
            model = AutoModelForSequenceClassification.from_pretrained(out)
            assert model.config.pad_token_id < rows
            assert AutoTokenizer.from_pretrained(out).pad_token_id < rows


def test_settings_of_sampling_that_stay_the_bases_are_said(on_top, model_dir, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    path = base / "generation_config.json"
    settings = json.loads(path.read_text()) | {"repetition_penalty": 1.05, "do_sample": True}
    path.write_text(json.dumps(settings))
    assert main([str(base), str(tmp_path / "out")]) == 0
    assert "keeps the base's repetition_penalty 1.05" in capsys.readouterr().out
