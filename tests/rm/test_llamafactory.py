"""A reward model that LLaMA-Factory 0.9.5 trained, scored here as it scored it itself.

The folder beside is what `python -m benchmarks.peers.llamafactory_rm FOLDER` makes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers import llamafactory_rm
from fastppo.cli import main
from fastppo.export.cli import main as export
from fastppo.models.batch import Budget
from fastppo.rewards.adapter import AdapterReward
from fastppo.types import Prompt, Rollout

FOLDER = Path(__file__).parents[1] / "fixtures" / "llamafactory_rm"
NEAR = {"atol": 2e-5, "rtol": 2e-5}  # float32 through other versions of torch and transformers


def scores(folder: Path) -> torch.Tensor:
    """LLaMA-Factory's own, (N, 2): chosen and rejected."""
    found = json.loads((folder / "scores.json").read_text())
    return torch.tensor([found["chosen"], found["rejected"]]).T


def predicted_here(folder: Path, tmp_path: Path, **changes) -> torch.Tensor:
    """The same by stage rm, from LLaMA-Factory's keys and its data."""
    settings = {
        "stage": "rm",
        "do_predict": True,
        "model_name_or_path": str(folder / "base"),
        "adapter_name_or_path": str(folder),
        "eval_dataset": "held_out",
        "dataset_dir": str(folder),
        "template": "chatml",
        "cutoff_len": 256,
        "output_dir": str(tmp_path / "predicted"),
        **changes,
    }
    (tmp_path / "predict.yaml").write_text(yaml.safe_dump(settings))
    assert main([str(tmp_path / "predict.yaml")]) == 0
    path = tmp_path / "predicted" / "generated_predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return torch.tensor([[row["chosen"], row["rejected"]] for row in rows])


def test_stage_rm_predicts_llamafactorys_own_scores(tmp_path):
    """Through its data, its template, its adapter, its head, and the place where it reads."""
    torch.testing.assert_close(predicted_here(FOLDER, tmp_path), scores(FOLDER), **NEAR)


def test_scores_read_at_eos_differ_from_llamafactorys(tmp_path):
    """The place is part of it: one token earlier the scores are not those."""
    folder = tmp_path / "marked"
    shutil.copytree(FOLDER, folder)
    (folder / "fastppo_reward.json").write_text(json.dumps({"score_at": "eos"}))
    gap = (predicted_here(folder, tmp_path) - scores(FOLDER)).abs().max()
    assert gap > 0.01


def test_stage_ppo_gives_llamafactorys_own_scores(tiny_roles, template):
    from fastppo.models.value_head import load_value_head

    held_out = json.loads((FOLDER / "held_out.json").read_text())
    made = tiny_roles(
        model_name_or_path=str(FOLDER / "base"),
        reward_model=str(FOLDER),
        reward_model_type="lora",
        value_head_init="zeros",
    )
    reward = AdapterReward(made, FOLDER, template, Budget(rows=3))
    assert load_value_head(FOLDER, 16, torch.device("cpu")).bias.item() != 0
    roles_of = {"human": "user", "gpt": "assistant"}
    rows, prompts = [], []
    for record in held_out:
        system, *turns = record["conversations"]
        messages = [{"role": roles_of[t["from"]], "content": t["value"]} for t in turns]
        ids = template.encode_prompt(messages, system["value"])
        prompts.append(Prompt(ids, messages[-1]["content"]))
        rows.append(template.encode_response(record["chosen"]["value"]))
    laid = [prompt.ids + row for prompt, row in zip(prompts, rows, strict=True)]
    width = max(map(len, laid))
    rollout = Rollout(
        prompts=prompts,
        input_ids_BT=torch.tensor([row + [template.pad_id] * (width - len(row)) for row in laid]),
        prompt_lengths=[len(prompt.ids) for prompt in prompts],
        response_lengths=[len(row) for row in rows],
        terminated=[True] * len(rows),
        sampler_logprob_N=torch.zeros(sum(map(len, rows))),
        texts=[""] * len(rows),
    )
    torch.testing.assert_close(reward(rollout), scores(FOLDER)[:, 0], **NEAR)


def test_llamafactorys_adapter_loads_in_peft_and_exports(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(FOLDER / "base")
    assert PeftModel.from_pretrained(base, str(FOLDER)).active_adapter == "default"
    arguments = [str(FOLDER), str(tmp_path / "out"), f"model_name_or_path={FOLDER / 'base'}"]
    assert export([*arguments, "stage=rm"]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").padding_side == "right"


@pytest.fixture
def llamafactory():
    """LLaMA-Factory itself, where it is installed."""
    reason = llamafactory_rm.absent()
    if reason is not None:
        pytest.skip(f"LLaMA-Factory is {reason}")
    return llamafactory_rm


@pytest.mark.slow
@pytest.mark.peers
def test_llamafactory_run_anew_is_scored_within_rounding(llamafactory, tmp_path):
    llamafactory.make(tmp_path / "made")
    found = predicted_here(tmp_path / "made", tmp_path)
    torch.testing.assert_close(found, scores(tmp_path / "made"), **NEAR)


@pytest.mark.slow
@pytest.mark.peers
def test_llamafactory_scores_our_reward_model_as_we_do(llamafactory, tmp_path, monkeypatch):
    """The other way, with a template that writes nothing behind EOS: both read there."""
    monkeypatch.chdir(tmp_path)
    settings = {**llamafactory.make_inputs(tmp_path), "template": "vicuna", "output_dir": "ours"}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train.yaml"]) == 0
    rows = (tmp_path / "ours" / "generated_predictions.jsonl").read_text().splitlines()
    wanted = torch.tensor([[row["chosen"], row["rejected"]] for row in map(json.loads, rows)])
    theirs = {"do_train": False, "adapter_name_or_path": "ours", "output_dir": "theirs"}
    found = scores(llamafactory.run(tmp_path, {**settings, **theirs}))
    torch.testing.assert_close(found, wanted, **NEAR)
