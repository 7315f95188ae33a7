"""The token tasks: a language of four letters, a tiny random model, and two rewards.

A prompt is one letter. A response has up to as many tokens as the task allows and may end earlier
with EOS. So few responses exist that the best policy can be computed (`exact.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
LETTERS = "abcd"
AFTER = dict(zip(LETTERS, LETTERS[1:] + LETTERS[0], strict=True))  # d is followed by a
MODEL_SEED = 0  # one reference, and so one optimum, for all runs


@dataclass(frozen=True)
class TokenTask:
    """A reward on responses of at most `length` tokens."""

    name: str
    length: int
    reward: Callable[[Sequence[str], Sequence[str]], list[float]]

    @property
    def target(self) -> str:
        """The reward as the key `reward_model` names it."""
        return f"{__name__}:{self.reward.__name__}"


def follows(prompt: str, response: str, places: int) -> float:
    """The share of the first `places` letters that follow the letter before them."""
    text = prompt + response[:places]
    return sum(AFTER[a] == b for a, b in pairwise(text)) / places


def alphabet(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Every one of the 6 letters counts."""
    return [follows(p, c, 6) for p, c in zip(prompts, completions, strict=True)]


def beginning(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The first 2 letters of 6 count; whatever comes after them changes nothing."""
    return [follows(p, c, 2) for p, c in zip(prompts, completions, strict=True)]


TASKS = {
    task.name: task
    for task in (TokenTask("alphabet", 6, alphabet), TokenTask("beginning", 6, beginning))
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """EOS and the letters: the whole vocabulary, so that every response can be listed."""
    vocab = {token: index for index, token in enumerate([EOS, *LETTERS])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def write_files(folder: Path, prompts_a_step: int) -> dict[str, Any]:
    """Write model, tokenizer and prompts into `folder`; returns the keys that name them.

    Every step has each prompt equally often, equal ones side by side: the sampler then runs each
    prompt once.
    """
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Large enough that the reference prefers some letters by far.
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(MODEL_SEED)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    prompts = folder / "prompts.json"
    equal = prompts_a_step // len(LETTERS)
    records = [{"instruction": letter} for letter in LETTERS for _ in range(equal)]
    prompts.write_text(json.dumps(records), encoding="utf-8")
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset": str(prompts),
        "disable_shuffling": True,
    }
