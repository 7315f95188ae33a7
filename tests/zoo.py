"""Tiny random models of many families, each with its own traits; the tokenizer is the toy's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PretrainedConfig

from fastppo import toy

TOKENIZER = toy.byte_tokenizer()
IDS = {
    "vocab_size": len(TOKENIZER),
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": None,
}
WIDE = {"initializer_range": 0.3}  # so that a frozen base has directions to learn along
GPT = {**IDS, **WIDE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
SIZES = {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = {**SIZES, **WIDE, "intermediate_size": 64, "max_position_embeddings": 512}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 8}
MOE = {"num_experts_per_tok": 2}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
TOWER = {
    "hidden_size": 64,  # wider than the text model: nothing may take it for the layers
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# Family -> its trait in words, and its configuration.
FAMILIES: dict[str, tuple[str, Callable[..., PretrainedConfig], dict[str, Any]]] = {
    "gpt2": ("Conv1D, learned positions", hf.GPT2Config, GPT),
    "opt": (
        "last state narrower than the layers, learned positions",
        hf.OPTConfig,
        {
            **SIZES,
            "ffn_dim": 64,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
            "init_std": 0.3,
        },
    ),
    "bloom": ("ALiBi, fused projections", hf.BloomConfig, {**IDS, **WIDE, "hidden_size": 32}),
    "gpt_neox": ("fused projections, parallel residual", hf.GPTNeoXConfig, PLAIN),
    "gptj": ("head with a bias, parallel residual", hf.GPTJConfig, {**GPT, "rotary_dim": 4}),
    "llama": ("", hf.LlamaConfig, GROUPED),
    "mistral": ("sliding window in all layers", hf.MistralConfig, {**GROUPED, "sliding_window": 8}),
    "mixtral": ("mixture of experts", hf.MixtralConfig, {**GROUPED, **MOE, "num_local_experts": 4}),
    "qwen2": ("tied embeddings", hf.Qwen2Config, {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("norms over query and key heads", hf.Qwen3Config, HEADED),
    "qwen3_moe": (
        "mixture of experts",
        hf.Qwen3MoeConfig,
        {**HEADED, **MOE, "num_experts": 4, "moe_intermediate_size": 16},
    ),
    "gemma2": (
        "softcapped logits, sliding window in every other layer",
        hf.Gemma2Config,
        {
            **HEADED,
            **WINDOW,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 5.0,
        },
    ),
    "gemma3_text": (
        "sliding window in most layers",
        hf.Gemma3TextConfig,
        {**HEADED, **WINDOW, "query_pre_attn_scalar": 8},
    ),
    "gemma3": (
        "text below a multimodal model",
        hf.Gemma3Config,
        {
            "text_config": {**HEADED, **WINDOW, "query_pre_attn_scalar": 8},
            "vision_config": TOWER,
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
            **{key: value for key, value in IDS.items() if key != "vocab_size"},
        },
    ),
    "phi": ("head with a bias, parallel residual", hf.PhiConfig, PLAIN),
    "phi3": ("fused projections", hf.Phi3Config, {**GROUPED, "sliding_window": 8}),
    "falcon": ("fused projections, one key head", hf.FalconConfig, {**SIZES, **WIDE}),
    "stablelm": ("norms with a bias", hf.StableLmConfig, GROUPED),
    "olmo2": ("norms behind the layers' parts", hf.Olmo2Config, GROUPED),
    "smollm3": ("layers without rotary positions", hf.SmolLM3Config, GROUPED),
    "glm4": ("fused MLP, four norms a layer", hf.Glm4Config, HEADED),
    "cohere2": (
        "scaled logits, parallel residual, sliding window",
        hf.Cohere2Config,
        {**GROUPED, **WINDOW, "logit_scale": 0.0625},
    ),
    "granite": ("divided logits", hf.GraniteConfig, {**GROUPED, "logits_scaling": 3.0}),
}

# One of a kind, which the fast tier has: rotary positions, softcaps and windows, learned positions,
# slopes in place of positions, experts.
KINDS = ("llama", "gemma2", "gpt2", "bloom", "qwen3_moe")


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a family's tiny model."""
    _, kind, settings = FAMILIES[family]
    return kind(**{**settings, **changes})


def write(family: str, folder: Path, **changes: Any) -> Path:
    """A family's tiny model with its tokenizer, in `folder`; norms and biases say something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(family, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def spread(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that tells any two responses apart: a random model's have no words to go by."""
    return [sum(map(ord, text)) % 17 / 8 for text in completions]
