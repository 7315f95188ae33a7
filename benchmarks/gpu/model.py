"""A 7B without a download: Qwen2.5-7B's shape, random weights, random text."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.gpu.plan import Plan
from fastppo import toy
from fastppo.config import Config, config_from_dict
from fastppo.memory.shapes import TABLE, ModelShape
from fastppo.models import given
from fastppo.models.load import disable_dropout
from fastppo.rm import load as reward_loading


@dataclass(frozen=True)
class Size:
    """What is built, and how long its sequences are."""

    shape: ModelShape
    device: str
    length: int  # tokens of prompt and response
    new_tokens: int  # of them sampled
    rank: int
    rows: int  # sequences of an optimiser step, a micro-batch each
    bf16: bool


def size_of(plan: Plan, new_tokens: int | None = None, rows: int | None = None) -> Size:
    """The 7B, or in a rehearsal a toy with as many parts."""
    new = new_tokens or plan.length // 8
    if plan.cuda:
        shape = TABLE["Qwen/Qwen2.5-7B"]
        return Size(shape, "cuda", plan.length, new, 64, rows or 4, bf16=True)
    shape = ModelShape(32, 2, 2, 1, 16, 64, 320, False, True)
    return Size(shape, "cpu", plan.length, new, 4, 2, bf16=False)


def write_files(size: Size, folder: Path) -> None:
    """Sizes and a tokenizer of bytes, no weights; pairs and prompts longer than there is room."""
    shape = size.shape
    tokenizer = toy.byte_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=size.length,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="bfloat16" if size.bf16 else "float32",
    ).save_pretrained(folder / "model")
    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choices(string.ascii_lowercase + " ", k=2 * size.length))

    pairs = [
        {"instruction": text(), "chosen": text(), "rejected": text()} for _ in range(2 * size.rows)
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "prompts.json").write_text(json.dumps([{"instruction": text()}] * size.rows))


def settings(size: Size, folder: Path, **more: Any) -> Config:
    """What both stages have in common."""
    return config_from_dict(
        {
            "model_name_or_path": str(folder / "model"),
            "template": "chatml",
            "lora_rank": size.rank,
            "bf16": size.bf16,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": size.rows,
            "overwrite_output_dir": True,
            "metrics_dir": str(folder / "metrics"),
            **more,
        }
    )


def rm_config(size: Size, folder: Path) -> Config:
    """Pairs of `size.length` tokens each."""
    return settings(
        size,
        folder,
        stage="rm",
        dataset=str(folder / "pairs.json"),
        output_dir=str(folder / "reward"),
        cutoff_len=size.length,
        max_steps=2,
    )


def ppo_config(size: Size, folder: Path, **more: Any) -> Config:
    """All four roles; every response goes on to its end."""
    return settings(
        size,
        folder,
        stage="ppo",
        dataset=str(folder / "prompts.json"),
        output_dir=str(folder / "ppo"),
        cutoff_len=size.length - size.new_tokens,
        max_new_tokens=size.new_tokens,
        min_new_tokens=size.new_tokens,
        ppo_epochs=1,
        max_steps=10,
        **more,
    )


@contextmanager
def random_weights(size: Size) -> Iterator[None]:
    """Inside, the base is made on the device, the same each time, and nothing is read."""

    def load(config: Config, device: torch.device, *_: Any, **__: Any) -> nn.Module:
        torch.manual_seed(0)
        made = Qwen2Config.from_pretrained(config.model_name_or_path)
        dtype = torch.bfloat16 if size.bf16 else torch.float32
        with device:
            base = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation="sdpa")
        base.requires_grad_(False)
        base.config.use_cache = False
        disable_dropout(base)
        return base

    with ExitStack() as stack:
        for module in (given, reward_loading):
            stack.enter_context(patch.object(module, "load_base", load))
        yield
