"""The toy of `init_state()`: a language model that trains in half a minute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from fastppo.config import Config

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SUBJECTS = ["rain", "tea", "trains", "a cat", "the sea", "bread", "winter", "a song"]
FORMS = ["Write about {}.", "What is {} like?", "Tell me of {}.", "A line on {}, please."]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte and chatml's three special tokens.

    It needs no file and no network.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )


def write_model(
    folder: Path, *, seed: int = 0, hidden_size: int = 32, layers: int = 2, **extra: Any
) -> None:
    """Write a randomly initialised Llama and its tokenizer into `folder`."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        # Large enough that adapters can learn with frozen random embeddings and head.
        initializer_range=0.3,
        **extra,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward: the share of vowels in each completion, which a random model learns in a minute."""
    return [sum(c in "aeiou" for c in text.lower()) / max(len(text), 1) for text in completions]


def config(folder: str | Path = "output/toy", **changes: Any) -> Config:
    """Write the toy's model and prompts below `folder`; returns a configuration to train it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    prompts = [{"instruction": form.format(s)} for form in FORMS for s in SUBJECTS]
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1), encoding="utf-8")
    settings: dict[str, Any] = {
        "stage": "ppo",
        "model_name_or_path": str(folder / "model"),
        "reward_model": "fastppo.toy:vowels",
        "reward_model_type": "function",
        "critic": "shared",
        "dataset": str(folder / "prompts.json"),
        "val_size": 8,
        "template": "chatml",
        "default_system": "",
        "output_dir": str(folder / "ppo"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "ppo_epochs": 4,
        "max_new_tokens": 12,
        "learning_rate": 3e-3,
        "lora_rank": 8,
        "init_kl_coef": 0.01,
        "horizon": 200,
        "max_steps": 40,
        "lr_scheduler_type": "constant",
        "disable_gradient_checkpointing": True,
        **changes,
    }
    return Config(**settings)
