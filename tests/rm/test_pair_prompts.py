"""What both texts of a pair begin with is run once: scores and gradients stay as they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from fastppo.cli import main
from fastppo.memory.budgets import PromptSharing
from fastppo.models.value_head import new_value_head
from fastppo.rm import train as rm_train
from fastppo.rm.model import RewardModel, pair_loss
from fastppo.rm.pair_prompts import TWICE, pair_prompts, share_pair_prompts
from fastppo.rm.pairs import collate
from fastppo.types import Pair
from tests import zoo
from tests.tiny import write_rm
from tests.written import lines, read

SAID = "what the answers of a pair have in common is run once"
PROMPT = list(range(40, 52))
# Unlike from the first word; alike in two words; one a part of the other; one and the same.
PAIRS = [
    Pair(PROMPT, [60, 61, 62], [70, 71]),
    Pair(PROMPT[3:], [60, 61, 62, 63, 64], [60, 61, 72]),
    Pair(PROMPT[:7], [60, 61, 62], [60]),
    Pair(PROMPT[1:], [60, 61], [60, 61]),
]
LLAMA = SimpleNamespace(quantization_bit=None, finetuning_type="full", lora_dropout=0.0)


class Always(PromptSharing):
    def pays(self, whole, once):
        return True


def reward_of(family, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = zoo.config_of(family)
        for name, value in changes.items():
            setattr(config, name, value)
        base = AutoModelForCausalLM.from_config(config).eval()
        head = new_value_head(base.config.get_text_config().hidden_size, torch.device("cpu"))
        head.weight.data.normal_()
    return RewardModel(base, head, autocast=None)


def batch():
    return collate(PAIRS, pad_id=0).values()


def test_a_pair_is_one_row_of_what_both_begin_with_and_their_ends():
    made = pair_prompts(*batch(), Always(32))
    begins = [(row == 0).sum().item() for row in made.part_GS]
    # The words alike belong to the beginning, but each text keeps its last token.
    assert begins == [12, 9 + 2, 7, 11 + 1]
    own = [[(row == part).sum().item() for part in (1, 2)] for row in made.part_GS]
    assert own == [[3, 2], [3, 1], [3, 1], [1, 1]]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "olmo2", "phi", "cohere2"])
def test_scores_and_gradients_are_those_of_whole_texts(family):
    model = reward_of(family, sliding_window=64)  # longer than the rows
    found, note = share_pair_prompts(LLAMA, model, PROMPT)
    assert found is not None
    assert note == [f"{SAID}, where that is less work"]

    def of(sharing):
        model.sharing = sharing
        model.zero_grad()
        scores = model(*batch())
        pair_loss(scores).backward()
        return scores.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    (wanted, gradients), (scores, others) = of(None), of(Always(32))
    torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=1e-4)
    first, last = (wanted[:4] - wanted[4:]).abs()[[0, 3]].tolist()
    assert last < 1e-5  # one text twice
    assert first > 1e-2
    largest = max(x.abs().max() for x in gradients)
    for a, b in zip(others, gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(largest), rtol=1e-3)


def test_it_is_done_only_where_it_is_less_work():
    """A tenth less at least: a long row of three parts costs attention that it would not need."""
    long = [Pair(PROMPT[:3], list(range(60, 90)), list(range(90, 120)))]
    model = reward_of("llama")
    sharing, _ = share_pair_prompts(LLAMA, model, PROMPT)
    assert pair_prompts(*collate(long, pad_id=0).values(), sharing) is None
    assert pair_prompts(*batch(), sharing).part_GS.shape == (4, 17)
    unlike = [Pair([40], [60], [61]), Pair([], [60, 61], [70, 71])]
    assert pair_prompts(*collate(unlike, pad_id=0).values(), Always(32)) is None


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"quantization_bit": 8}, "the base is in 8 bits"),
        ("llama", {"finetuning_type": "lora", "lora_dropout": 0.1}, "lora_dropout draws anew"),
        ("gemma2", {}, "this model (gemma2) does not run it once"),
        ("bloom", {}, "this model (bloom) does not run it once"),
    ],
)
def test_what_does_not_allow_it_is_said(family, changes, words):
    model = reward_of(family)
    config = SimpleNamespace(**{**vars(LLAMA), **changes})
    sharing, (note,) = share_pair_prompts(config, model, PROMPT)
    assert sharing is None
    assert note.startswith(f"{TWICE}: ")
    assert words in note


def test_a_window_limits_the_length():
    model = reward_of("qwen3", use_sliding_window=True, sliding_window=64)
    sharing, _ = share_pair_prompts(LLAMA, model, PROMPT)
    assert sharing.longest == 64
    assert not sharing.pays((2, 65), (1, 66))


@pytest.fixture
def train(model_dir, tmp_path, monkeypatch, capsys):
    """Runs stage rm; the folder, what was printed, and the tokens that the trunk has run."""
    monkeypatch.chdir(tmp_path)
    tokens = []
    own = LlamaModel.forward

    def forward(self, input_ids=None, **given):
        tokens.append(input_ids.numel())
        return own(self, input_ids=input_ids, **given)

    monkeypatch.setattr(LlamaModel, "forward", forward)

    def run(name, **changes):
        tokens.clear()
        keys = {"output_dir": name, "overwrite_output_dir": True, "logging_steps": 1}
        write_rm(tmp_path, model_dir, **{**keys, "per_device_train_batch_size": 2, **changes})
        capsys.readouterr()
        assert main(["rm.yaml"]) == 0
        return tmp_path / name, " ".join(capsys.readouterr().out.split()), sum(tokens)

    return run


def test_the_training_is_that_of_whole_texts_with_fewer_tokens(train, monkeypatch):
    shared, said, fewer = train("shared", num_train_epochs=2)
    assert f"note: {SAID}, where that is less work" in said
    with monkeypatch.context() as patch:
        patch.setattr(rm_train, "share_pair_prompts", lambda *_: (None, []))
        whole, other, tokens = train("whole", num_train_epochs=2)
    assert SAID not in other
    assert fewer < 0.9 * tokens
    rows = zip(lines(shared / "trainer_log.jsonl"), lines(whole / "trainer_log.jsonl"), strict=True)
    losses = [(a["loss"], b["loss"]) for a, b in rows if "loss" in a]
    assert len(losses) > 3
    for a, b in losses:
        assert a == pytest.approx(b, abs=1e-4)
    found, wanted = (read(folder / "eval_results.json") for folder in (shared, whole))
    for metric in ("eval_loss", "eval_margin", "eval_chosen_score"):
        assert found[metric] == pytest.approx(wanted[metric], abs=1e-4)


def test_layers_that_run_once_a_text_run_whole_texts(train):
    _, said, _ = train("lower", lora_layers=1, num_train_epochs=2)
    assert "run once, before the first epoch" in said
    assert SAID not in said
