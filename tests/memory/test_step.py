"""A PPO step never holds the logits of all its tokens: read from the allocator's events."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import allocations, peak_bytes
from fastppo import toy
from fastppo.ops import head, rows, word_blocks
from fastppo.ppo import trainer
from fastppo.ppo.rollout import sample
from fastppo.ppo.sampling import Sampling

# So large that nothing else of the tiny model is nearly as large as a row of logits a token.
VOCAB, HIDDEN, NEW = 40_000, 8, 24
ROW = VOCAB * 4


@pytest.fixture
def large_vocabulary(tmp_path, state, monkeypatch):
    """A state whose model knows 40000 words, with chunks and blocks of two rows of logits."""
    folder = tmp_path / "large"
    toy.write_model(folder, hidden_size=HIDDEN)
    config = LlamaConfig.from_pretrained(folder, vocab_size=VOCAB)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    monkeypatch.setattr(head, "_CHUNK_BYTES_CPU", 2 * ROW)
    monkeypatch.setattr(head, "_CHUNK_ROWS_CPU", 1)
    monkeypatch.setattr(word_blocks, "_BYTES", 2 * ROW)
    monkeypatch.setattr(rows, "_BLOCK_BYTES_CPU", ROW)

    def make(**changes):
        return state(
            model_name_or_path=str(folder),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            ppo_epochs=1,
            max_steps=1,
            **changes,
        )

    return make


@pytest.mark.parametrize("critic", ["adapter", pytest.param("shared", marks=pytest.mark.slow)])
def test_no_step_allocates_a_row_of_logits_for_every_token(large_vocabulary, critic):
    made = large_vocabulary(critic=critic)
    prompts = made.config.per_device_train_batch_size
    tokens = prompts * NEW
    events = allocations(lambda: trainer.step_update(made))
    # The rollout's own are one row a prompt, of the step that it samples.
    assert max(events) <= prompts * ROW
    assert max(events) < tokens * ROW / 8
    assert peak_bytes(events) < tokens * ROW


def test_the_rollout_keeps_no_scores(large_vocabulary):
    made = large_vocabulary()
    peaks = []
    for new in (NEW // 3, NEW):
        sampling = Sampling(max_new_tokens=new, min_new_tokens=new)

        def rollout(sampling=sampling):
            return sample(
                made.roles,
                made.prompts[:4],
                sampling=sampling,
                template=made.template,
                tokenizer=made.tokenizer,
                seed=0,
            )

        with made.roles.use("actor"):
            rollout()
            peaks.append(peak_bytes(allocations(rollout)))
    # Sixteen more steps of four rows would be 64 rows of logits; what grows is the cache of keys.
    assert peaks[1] - peaks[0] < ROW
    assert peaks[1] < 12 * 4 * ROW


def test_the_check_sees_logits_of_all_tokens(large_vocabulary):
    """The plain model's forward is what the step avoids."""
    made = large_vocabulary()
    model = AutoModelForCausalLM.from_pretrained(made.config.model_name_or_path)
    ids = torch.ones(4, NEW, dtype=torch.long)
    assert max(allocations(lambda: model(ids))) >= 4 * NEW * ROW
