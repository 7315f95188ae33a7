"""A small PPOTrainer on the tiny model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo import PPOConfig, PPOTrainer
from fastppo.toy import vowels
from tests.tiny import PROMPTS


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **changes})


def turns(texts: list[str] = PROMPTS) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": text}]} for text in texts]


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        settings = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "max_new_tokens": 8,
            "max_steps": 2,
            "ppo_epochs": 2,
            "learning_rate": 1e-3,
            "template": "chatml",
            "default_system": "",
            "gradient_checkpointing": False,
            "eval_max_samples": 2,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PPOConfig(**{**settings, **changes})

    return make


@pytest.fixture
def model(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir)


@pytest.fixture
def trainer(arguments: Callable[..., Any], model: Any, model_dir: Path) -> Callable[..., Any]:
    """PPOTrainer with LoRA on the tiny model; arguments of the class by name, `args` as a dict."""

    fresh = [model]  # a model with adapters in it cannot be given again

    def make(args: dict[str, Any] | None = None, **changes: Any) -> Any:
        given = {
            "model": fresh.pop() if fresh else AutoModelForCausalLM.from_pretrained(model_dir),
            "reward_funcs": vowels,
            "train_dataset": turns(),
            "processing_class": AutoTokenizer.from_pretrained(model_dir),
            "peft_config": lora(),
            **changes,
        }
        return PPOTrainer(args=arguments(**(args or {})), **given)

    return make
