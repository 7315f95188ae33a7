"""A truncated response is shown to every kind of reward as it is: without an end of turn."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastppo.errors import UserError
from fastppo.export.cli import main
from fastppo.models.batch import Budget
from fastppo.rewards import function as reward_function
from fastppo.rewards.adapter import AdapterReward, HeadReward
from fastppo.rewards.function import FunctionReward
from fastppo.rewards.model import ClassifierReward, load_full
from fastppo.rewards.server import ApiReward
from fastppo.servers.client import Client
from fastppo.types import Rollout
from tests.tiny import PROMPTS

SAID = ["Tea is", "Rain falls.", "Bread <think>or", "The sea."]
ENDED = [False, True, False, True]
CPU = torch.device("cpu")


@pytest.fixture
def answers(lay_out, template) -> Rollout:
    """Two responses that max_new_tokens cut off, and two that ended by themselves."""
    ids = [template.encode_response(text) for text in SAID]
    cut = [row if ended else row[:-1] for row, ended in zip(ids, ENDED, strict=True)]
    made = replace(lay_out(PROMPTS, cut), texts=SAID)
    assert made.terminated == ENDED
    return made


@pytest.fixture(params=["eos", "suffix"])
def folder(request, reward_dir, tmp_path) -> Path:
    """A reward model that is read at EOS, as fastppo trains it, or behind it, as LLaMA-Factory."""
    copy = tmp_path / "reward"
    shutil.copytree(reward_dir, copy)
    if request.param == "suffix":
        (copy / "fastppo_reward.json").unlink()
    return copy


def heads_tokens(reward: HeadReward, rollout: Rollout) -> list[list[int]]:
    """What a head's trunk is given, by response."""
    rows: dict[int, list[int]] = {}
    hidden = reward.hidden

    def noted(batch: Any) -> torch.Tensor:
        for row, ids, mask in zip(batch.rows, batch.input_ids_BT, batch.mask_BT, strict=True):
            rows[row] = ids[mask.bool()].tolist()
        return hidden(batch)

    reward.hidden = noted
    reward(rollout)
    return [rows[i] for i in range(len(rollout.prompts))]


def classifiers_tokens(reward: ClassifierReward, rollout: Rollout) -> list[list[int]]:
    """The same of a classifier, one conversation at a time."""
    reward.budget = Budget(rows=1)
    seen: dict[tuple[int, ...], None] = {}
    logits = reward.logits

    def noted(rows: list[list[int]], device: torch.device) -> torch.Tensor:
        seen.update(dict.fromkeys(map(tuple, rows)))
        return logits(rows, device)

    reward.logits = noted
    reward(rollout)
    return sorted(list(row) for row in seen)


def test_all_reward_models_read_the_same_tokens(
    folder, answers, tiny_roles, config, template, tmp_path, capsys
):
    """An adapter, the same on a base of its own, and the classifier that it is exported to."""
    roles = tiny_roles(reward_model=str(folder), reward_model_type="lora")
    adapter = AdapterReward(roles, folder, template, Budget(rows=4))
    read = heads_tokens(adapter, answers)
    for ids, whole, prompt, text, ended in zip(
        read, answers.input_ids_BT.tolist(), answers.prompt_lengths, SAID, ENDED, strict=True
    ):
        said = template.encode_response(text)[: None if ended else -1]
        assert ids[: prompt + len(said)] == whole[:prompt] + said
        behind = list(template.suffix_ids) if ended and adapter.score_at == "suffix" else []
        assert ids[prompt + len(said) :] == behind

    base = roles.base.config._name_or_path
    settings = config(
        reward_model=base, reward_model_type="full", reward_model_adapters=str(folder)
    )
    full = load_full(base, settings, CPU, template)
    assert isinstance(full, HeadReward)
    assert heads_tokens(full, answers) == read

    assert main([str(folder), str(tmp_path / "out"), "stage=rm", "template=chatml"]) == 0
    settings = config(reward_model=str(tmp_path / "out"), reward_model_type="full")
    made = load_full(str(tmp_path / "out"), settings, CPU, template)
    assert isinstance(made, ClassifierReward)
    assert classifiers_tokens(made, answers) == sorted(read)
    torch.testing.assert_close(made(answers), adapter(answers), atol=1e-4, rtol=1e-4)


def test_a_server_reads_the_end_token_of_finished_responses_alone(answers, tokenizer, monkeypatch):
    sent: list[str] = []

    def ask(self: Client, body: dict[str, Any]) -> bytes:
        sent.extend(body["messages"])
        return json.dumps({"scores": [0.0] * len(body["messages"])}).encode()

    monkeypatch.setattr(Client, "ask", ask)
    ApiReward("http://x", tokenizer, timeout=1, retries=0, batch_size=4)(answers)
    ends = [
        text if not ended else text + "<|im_end|>" for text, ended in zip(SAID, ENDED, strict=True)
    ]
    assert [text.endswith(end) for text, end in zip(sent, ends, strict=True)] == [True] * 4


def test_a_function_reads_text_and_knows_the_end_by_the_ids(answers, template, monkeypatch):
    seen: dict[str, Any] = {}

    def judge(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        seen.update(texts=completions, ended=[ids[-1] == template.eos_id for ids in completion_ids])
        return [0.0] * len(completions)

    monkeypatch.setattr(reward_function, "load_function", lambda *_: judge)
    FunctionReward("mine:judge")(answers)
    assert seen == {"texts": SAID, "ended": ENDED}


class Words:
    """A tokenizer of nothing but a chat template."""

    model_max_length = None

    def __init__(self, write: Any) -> None:
        self.write = write

    def apply_chat_template(self, chat: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        return self.write(chat[-1]["content"])

    def __call__(self, text: str, **_: Any) -> dict[str, list[str]]:
        return {"input_ids": [*text]}


@pytest.fixture
def classifier(tiny_roles):
    """A classifier whose chat template is a function of the answer."""
    base = tiny_roles().base

    def make(write: Any) -> ClassifierReward:
        return ClassifierReward(base, Words(write), "mine", Budget(rows=4))

    return make


def test_a_template_that_writes_thoughts_anew_stops_no_run(classifier, answers):
    """Qwen3's puts a thought on lines of its own, so the answer is not in there word by word."""
    made = classifier(lambda said: "<think>\n" + said.removeprefix("<think>") + "<end>")
    prompt = answers.prompts[0]
    assert made.encode(prompt, "<think>x</think>y") == [*"<think>\nx</think>y<end>"]
    assert made.encode(prompt, "<think>x</think>y", truncated=True) == [*"<think>\nx</think>y"]
    assert made.encode(prompt, "", truncated=True) == [*"<think>\n"]


def test_a_template_without_the_end_of_an_answer_is_refused(classifier, answers):
    made = classifier(lambda said: said[:3])
    with pytest.raises(UserError, match="leaves out the end of an answer"):
        made.encode(answers.prompts[0], "rain", truncated=True)
