"""Tokens without a row, and positions past the last: seen before a model computes with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo.cli import main
from fastppo.config.published import POSITIONS, last_position
from fastppo.export.cli import main as export
from fastppo.models import build as roles
from fastppo.run.sizes import check_adapter_fits
from tests import zoo
from tests.tiers import slow_unless
from tests.tiny import make_config

CPU = torch.device("cpu")
RUN = {
    "dataset": "prompts.json",
    "template": "chatml",
    "output_dir": "out",
    "cutoff_len": 64,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
}
PPO = {
    **RUN,
    "stage": "ppo",
    "reward_model": "fastppo.toy:vowels",
    "reward_model_type": "function",
    "metrics_dir": "metrics",
    "max_new_tokens": 4,
}
RM = {**RUN, "stage": "rm", "dataset": "pairs.json"}
ROWS = len(zoo.TOKENIZER)


@pytest.fixture
def padded(tmp_path, monkeypatch) -> Path:
    """The working directory, with a model whose tokenizer pads with a token without a row."""
    monkeypatch.chdir(tmp_path)
    zoo.write("llama", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == ROWS
    tokenizer.save_pretrained("model")
    prompts = [{"instruction": "Say 1"}, {"instruction": "Say a great deal more of 2"}]
    pairs = [{**row, "chosen": "yes and more", "rejected": "no"} for row in prompts]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    return tmp_path


def run(settings: dict[str, Any], **changes: Any) -> int:
    """The exit code of a run on the model of `padded`."""
    Path("run.yaml").write_text(json.dumps({**settings, "model_name_or_path": "model", **changes}))
    return main(["run.yaml", "overwrite_output_dir=true"])


@pytest.mark.parametrize(
    "settings", [PPO, pytest.param(RM, marks=pytest.mark.slow)], ids=["ppo", "rm"]
)
def test_eos_pads_where_the_padding_token_has_no_row(padded, capsys, settings):
    assert run(settings) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"[PAD] (id {ROWS}), and the model's embeddings have {ROWS} rows, none for it" in said
    saved = AutoTokenizer.from_pretrained("out")
    assert saved.pad_token == saved.eos_token
    assert saved.pad_token_id < ROWS


def test_padding_with_eos_is_padding_with_any_other_token(padded):
    """The same losses as with a padding token that has a row, and no part of any loss."""
    logs = []
    for pad in ("[PAD]", "<|endoftext|>"):
        tokenizer = AutoTokenizer.from_pretrained("model")
        tokenizer.pad_token = pad
        tokenizer.save_pretrained("model")
        assert run(RM, max_steps=2, logging_steps=1) == 0
        entries = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
        logs.append([entry["loss"] for entry in entries if "loss" in entry])
    assert len(logs[0]) == 2
    assert logs[0] == logs[1]


@pytest.mark.slow  # a classifier that pads with it is below
def test_a_reward_model_whose_padding_token_has_no_row_is_exported_and_scores(padded, capsys):
    assert run(RM) == 0
    shutil.copy("model/tokenizer_config.json", "out")  # as a run before this note would leave it
    shutil.copy("model/tokenizer.json", "out")
    assert export(["out", "exported"]) == 0
    pad = json.loads(Path("exported/config.json").read_text())["pad_token_id"]
    assert pad < ROWS
    changes = {"reward_model": "exported", "reward_model_type": "full"}
    assert run({**PPO, **changes}, per_device_train_batch_size=2) == 0


def test_the_same_model_is_a_reference_whatever_token_it_lacks(padded):
    """Two copies of one model have one tokenizer, though it has more tokens than they have rows."""
    shutil.copytree("model", "ref")
    assert run(PPO, ref_model="ref") == 0


def test_a_config_whose_padding_token_has_no_row_loads(padded):
    """PyTorch makes no embeddings with such a padding index."""
    path = Path("model/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": ROWS}))
    assert run(PPO) == 0


@pytest.mark.parametrize("pad", [pytest.param(-1, marks=pytest.mark.slow), ROWS])
def test_a_classifier_pads_with_a_token_that_has_a_row(padded, pad):
    """-1 stands in many older config.json files."""
    assert run(RM) == 0
    assert export(["out", "exported"]) == 0
    path = Path("exported/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": pad}))
    assert run({**PPO, "reward_model": "exported", "reward_model_type": "full"}) == 0


@pytest.mark.parametrize(
    ("settings", "what"),
    [(PPO, "a prompt"), pytest.param(RM, "a pair", marks=pytest.mark.slow)],
)
def test_another_token_without_a_row_is_refused_where_the_data_has_it(
    padded, capsys, settings, what
):
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.add_tokens([AddedToken("[TASK]", special=True)])
    tokenizer.save_pretrained("model")
    assert run(settings) == 0  # nothing has it yet
    for name in ("prompts.json", "pairs.json"):
        text = (padded / name).read_text()
        (padded / name).write_text(text.replace("Say 1", "[TASK] Say 1"))
    capsys.readouterr()
    assert run(settings, output_dir="other") == 2
    assert capsys.readouterr().err.strip() == (
        f"fastppo-train: error: dataset: {what} has the token [TASK] (id {ROWS + 1}), and the "
        f"model's embeddings have {ROWS} rows, none for it; give the model a row for it "
        "(resize_token_embeddings) and save it, or take the token out"
    )
    assert not Path("other").exists()
    # The cure, followed.
    model = AutoModelForCausalLM.from_pretrained("model")
    model.resize_token_embeddings(ROWS + 2)
    model.save_pretrained("model")
    assert run(settings, output_dir="other") == 0


def test_positions_end_where_the_family_says_so(tmp_path):
    """One token more than there are positions fails; as many as there are do not."""
    for family in ("gpt2", "gptj", "opt"):
        model = AutoModelForCausalLM.from_pretrained(zoo.write(family, tmp_path / family))
        name, most = last_position(model.config.to_dict())
        assert (name in model.config.to_dict(), most) == (True, 128)
        with torch.no_grad():
            model(input_ids=torch.zeros(1, most, dtype=torch.long))
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.zeros(1, most + 1, dtype=torch.long))


@pytest.mark.parametrize(
    "family", slow_unless(zoo.KINDS.__contains__, sorted(set(zoo.FAMILIES) - POSITIONS.keys()))
)
def test_other_families_go_on_past_what_they_were_trained_for(family, tmp_path):
    changes = {"max_position_embeddings": 16} if family not in ("bloom", "gemma3") else {}
    if family == "gemma3":
        text = {**zoo.FAMILIES[family][2]["text_config"], "max_position_embeddings": 16}
        changes = {"text_config": text}
    if family == "phi3":
        changes |= {"original_max_position_embeddings": 16}
    model = AutoModelForCausalLM.from_pretrained(zoo.write(family, tmp_path, **changes))
    assert last_position(model.config.to_dict()) is None
    with torch.no_grad():
        logits = model(input_ids=torch.zeros(1, 40, dtype=torch.long)).logits
    assert logits.isfinite().all()


def test_a_rotary_model_beyond_its_training_is_a_note(padded, capsys):
    path = Path("model/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 20}))
    assert run(PPO) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "model was trained for 20 (max_position_embeddings); lower cutoff_len or" in said


def test_a_cutoff_that_the_error_names_is_taken(padded, capsys):
    """The cure, followed once."""
    zoo.write("gpt2", padded / "gpt2")
    asked = {"model_name_or_path": "gpt2", "cutoff_len": 200, "max_new_tokens": 8}
    assert run(PPO, **asked) == 2
    line = capsys.readouterr().err
    assert "a sequence can have 208 tokens (cutoff_len 200 + max_new_tokens 8)" in line
    assert "gpt2 has positions for 128 (n_positions); lower cutoff_len to 120 or less" in line
    assert run(PPO, **{**asked, "cutoff_len": 120}) == 0


def test_a_reference_with_fewer_positions_is_refused(padded, capsys):
    for name, positions in (("gpt2", 128), ("short", 64)):
        zoo.write("gpt2", padded / name, n_positions=positions)
    asked = {"model_name_or_path": "gpt2", "ref_model": "short", "cutoff_len": 80}
    assert run(PPO, **asked) == 2
    assert "ref_model short has positions for 64" in capsys.readouterr().err


def test_adapters_of_the_same_base_fit_it(tmp_path):
    """Whatever the family: no adapter that was trained on a base is refused on it."""
    from fastppo.run import save

    for family in ("gpt2", "gemma3", "qwen2"):
        folder = zoo.write(family, tmp_path / family)
        config = make_config(folder, tmp_path, cutoff_len=32, lora_target="all")
        made = roles.build(config, CPU)
        save.save_weights(made.places["actor"].model, tmp_path / f"{family}-adapter")
        check_adapter_fits("run.yaml", "x", str(tmp_path / f"{family}-adapter"), str(folder))
