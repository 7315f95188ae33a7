"""The sizes of a language model, from its config.json or a table; without weights or torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastppo.config.model import own_dtype
from fastppo.config.published import text_part
from fastppo.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder with gated MLPs and grouped-query attention that memory depends on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool  # embedding and head are one matrix
    qkv_bias: bool = False
    bias: int = 0  # a layer's further biases: elements
    qk_norm: bool = False  # a norm over each query and key head
    qk_norm_whole: bool = False  # a norm over all query heads, and one over all key heads
    norms: int = 2  # a layer's norms over the hidden size; Gemma has 4
    norm_bias: bool = False
    rms: bool = True  # norms are RMS norms
    silu: bool = True  # the activation of the gated MLP
    softcapped: bool = False  # attention logits have a softcap, and so no fused kernel
    sliding_layers: int = 0  # layers that attend to `window` tokens and cache no more
    window: int = 0
    dtype: str = "bfloat16"  # dtype of the published weights

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (input size, output size) of the linear layers in a decoder layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Number of weights in all linear layers except the head: those that can be quantised."""
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def layer_parameters(self) -> int:
        """One decoder layer."""
        heads = self.heads + self.kv_heads
        bias = (heads + self.kv_heads) * self.head_dim * self.qkv_bias + self.bias
        norms = self.norms * self.hidden * (1 + self.norm_bias)
        norms += 2 * self.head_dim * self.qk_norm + heads * self.head_dim * self.qk_norm_whole
        return self.linear_parameters // self.layers + bias + norms

    @property
    def embedding_parameters(self) -> int:
        """Number of parameters of the embedding, which is also that of the head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model; tied weights are counted once."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        last_norm = self.hidden * (1 + self.norm_bias)
        return embeddings + self.layers * self.layer_parameters + last_norm

    def cached_tokens(self, length: int) -> int:
        """Cached tokens, summed over all layers, of a sequence of `length` tokens."""
        full = self.layers - self.sliding_layers
        return full * length + self.sliding_layers * min(length, self.window or length)

    def lora_parameters(self, rank: int, target: str = "all", layers: int | None = None) -> int:
        """Number of parameters of an adapter of `rank` on the linear layers that `target` names."""
        adapted = sum(rank * (a + b) for a, b in self.targets(target).values())
        return adapted * (self.layers if layers is None else min(layers, self.layers))

    def targets(self, target: str) -> dict[str, tuple[int, int]]:
        """The linear layers that `lora_target` names; unknown names are ignored."""
        names = [name.strip() for name in target.split(",")]
        return {
            name: size
            for name, size in self.linears.items()
            if target == "all" or any(asked.rpartition(".")[2] == name for asked in names)
        }


def _qwen25(hidden: int, layers: int, heads: int, kv: int, i: int, vocab: int) -> ModelShape:
    tied = vocab == 151936
    return ModelShape(
        hidden, layers, heads, kv, hidden // heads, i, vocab, tied=tied, qkv_bias=True
    )


def _qwen3(hidden: int, layers: int, heads: int, i: int, *, tied: bool) -> ModelShape:
    return ModelShape(hidden, layers, heads, 8, 128, i, 151936, tied=tied, qk_norm=True)


def _llama(
    hidden: int, layers: int, heads: int, kv: int, i: int, vocab: int = 128256, tied: bool = False
) -> ModelShape:
    return ModelShape(hidden, layers, heads, kv, hidden // heads, i, vocab, tied=tied)


def _gemma2(hidden: int, layers: int, heads: int, kv: int, d: int, i: int) -> ModelShape:
    return ModelShape(
        *(hidden, layers, heads, kv, d, i, 256000),
        tied=True,
        norms=4,
        silu=False,
        softcapped=True,
        sliding_layers=layers // 2,
        window=4096,
    )


def _gemma3(
    hidden: int, layers: int, heads: int, kv: int, d: int, i: int, vocab: int = 262208
) -> ModelShape:
    return ModelShape(
        *(hidden, layers, heads, kv, d, i, vocab),
        tied=True,
        qk_norm=True,
        norms=4,
        silu=False,
        sliding_layers=layers - layers // 6,
        window=512 if hidden == 1152 else 1024,
    )


# From the published config.json files; tests compare every parameter count with the published one.
TABLE: dict[str, ModelShape] = {
    "Qwen/Qwen2.5-0.5B": _qwen25(896, 24, 14, 2, 4864, 151936),
    "Qwen/Qwen2.5-1.5B": _qwen25(1536, 28, 12, 2, 8960, 151936),
    "Qwen/Qwen2.5-3B": _qwen25(2048, 36, 16, 2, 11008, 151936),
    "Qwen/Qwen2.5-7B": _qwen25(3584, 28, 28, 4, 18944, 152064),
    "Qwen/Qwen2.5-14B": _qwen25(5120, 48, 40, 8, 13824, 152064),
    "Qwen/Qwen2.5-32B": _qwen25(5120, 64, 40, 8, 27648, 152064),
    "Qwen/Qwen2.5-72B": _qwen25(8192, 80, 64, 8, 29568, 152064),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 9728, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 12288, tied=False),
    "Qwen/Qwen3-14B": _qwen3(5120, 40, 40, 17408, tied=False),
    "Qwen/Qwen3-32B": _qwen3(5120, 64, 64, 25600, tied=False),
    "meta-llama/Llama-3.1-8B": _llama(4096, 32, 32, 8, 14336),
    "meta-llama/Llama-3.1-70B": _llama(8192, 80, 64, 8, 28672),
    "meta-llama/Llama-3.1-405B": _llama(16384, 126, 128, 8, 53248),
    "meta-llama/Llama-3.2-1B": _llama(2048, 16, 32, 8, 8192, tied=True),
    "meta-llama/Llama-3.2-3B": _llama(3072, 28, 24, 8, 8192, tied=True),
    "meta-llama/Llama-3.3-70B": _llama(8192, 80, 64, 8, 28672),
    "mistralai/Mistral-7B-v0.1": replace(
        _llama(4096, 32, 32, 8, 14336, 32000), sliding_layers=32, window=4096
    ),
    "mistralai/Mistral-7B-v0.2": _llama(4096, 32, 32, 8, 14336, 32000),
    "mistralai/Mistral-7B-v0.3": _llama(4096, 32, 32, 8, 14336, 32768),
    "google/gemma-2-2b": _gemma2(2304, 26, 8, 4, 256, 9216),
    "google/gemma-2-9b": _gemma2(3584, 42, 16, 8, 256, 14336),
    "google/gemma-2-27b": _gemma2(4608, 46, 32, 16, 128, 36864),
    # The language model alone, without the vision tower.
    "google/gemma-3-1b": _gemma3(1152, 26, 4, 1, 256, 6912, 262144),
    "google/gemma-3-4b": _gemma3(2560, 34, 8, 4, 256, 10240),
    "google/gemma-3-12b": _gemma3(3840, 48, 16, 8, 256, 15360),
    "google/gemma-3-27b": _gemma3(5376, 62, 32, 16, 128, 21504),
    "HuggingFaceTB/SmolLM2-135M": _llama(576, 30, 9, 3, 1536, 49152, tied=True),
    "HuggingFaceTB/SmolLM2-360M": _llama(960, 32, 15, 5, 2560, 49152, tied=True),
    "HuggingFaceTB/SmolLM2-1.7B": _llama(2048, 24, 32, 32, 8192, 49152, tied=True),
}
_SUFFIX = re.compile(r"(-instruct|-it|-pt|-base)$")


def _plain(name: str) -> str:
    """The last part of a hub name or path, without the suffix of an instruct model."""
    last = Path(name).name.lower().replace("meta-llama-3", "llama-3")
    return _SUFFIX.sub("", last.replace("-instruct-v", "-v"))


def from_table(name: str) -> tuple[ModelShape, str] | None:
    """The table's entry, and its name, for a hub name or for a folder with such a name."""
    for known, shape in TABLE.items():
        if _plain(known) == _plain(name):
            return shape, known
    return None


# Families whose layers the plan knows: gated MLPs, and queries, keys and values projected apart.
# A test holds their parameters against transformers' own models.
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "stablelm"),
    *("gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2"),
)
# What a config.json of these may leave out, and is not what it is elsewhere.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 256, "num_key_value_heads": 16},
    "gemma2": {"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096},
    "gemma3_text": {
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "vocab_size": 262208,
    },
    "qwen3": {"head_dim": 128},
}
TIED = ("gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2", "smollm3")
SILU = ("silu", "swish")  # names of an activation, by transformers
# Every so many layers attends to all tokens, the others to a window: where no layer_types says so.
FULL_EVERY = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}


def sliding_layers(kind: str, own: dict[str, Any], layers: int) -> int:
    """Layers that attend to a window, of the text model with this config.json."""
    if own.get("layer_types"):
        return sum(name == "sliding_attention" for name in own["layer_types"])
    if kind == "mistral":
        return layers if own.get("sliding_window") else 0
    every = int(own.get("sliding_window_pattern") or FULL_EVERY.get(kind, 1))
    return layers - layers // every if kind in FULL_EVERY else 0


def from_config(data: dict[str, Any], where: str) -> ModelShape:
    """The shape that a config.json describes, in transformers' names.

    Raises:
        UserError: it says too little, or is of a family that the plan does not know.
    """
    own = text_part(data)
    kind = str(own.get("model_type", ""))
    own = {**DEFAULTS.get(kind, {}), **{key: x for key, x in own.items() if x is not None}}
    unknown = kind not in FAMILIES or own.get("qk_layernorm") or own.get("use_parallel_residual")
    if unknown and "model_type" in own:
        raise UserError(
            f"model_name_or_path: {where} is of the family {kind}, and the memory plan knows the "
            f"layers of {', '.join(FAMILIES)}"
        )
    try:
        hidden, heads = int(own["hidden_size"]), int(own["num_attention_heads"])
        layers, wide = int(own["num_hidden_layers"]), int(own["intermediate_size"])
        sliding = sliding_layers(kind, own, layers)
        biased = bool(own.get("attention_bias", False))
        named = bool(own.get("use_qkv_bias", kind == "qwen2"))
        bias = hidden * biased + (2 * wide + hidden) * bool(own.get("mlp_bias", False))
        return ModelShape(
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=int(own.get("num_key_value_heads") or heads),
            head_dim=int(own.get("head_dim") or hidden // heads),
            intermediate=wide,
            vocab=int(own["vocab_size"]),
            tied=bool(own.get("tie_word_embeddings", kind in TIED)),
            qkv_bias=biased or named,
            bias=bias,
            qk_norm=kind in ("qwen3", "gemma3", "gemma3_text"),
            qk_norm_whole=kind == "olmo2",
            norms={"gemma2": 4, "gemma3": 4, "gemma3_text": 4, "cohere": 1, "cohere2": 1}.get(
                kind, 2
            ),
            norm_bias=kind == "stablelm",
            rms=kind not in ("stablelm", "cohere", "cohere2"),
            silu=not kind.startswith("gemma") and own.get("hidden_act", "silu") in SILU,
            softcapped=own.get("attn_logit_softcapping") is not None,
            sliding_layers=sliding,
            window=int(own.get("sliding_window") or 0) if sliding else 0,
            dtype=own_dtype(data),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"model_name_or_path: {where} does not say how large the model is ({error}); the plan "
            "knows decoders with hidden_size, num_hidden_layers, intermediate_size, vocab_size"
        ) from None


def find_shape(name: str, cache_dir: str | None = None, revision: str = "main") -> ModelShape:
    """`find_shape_and_source` without the source."""
    return find_shape_and_source(name, cache_dir, revision)[0]


def find_shape_and_source(
    name: str, cache_dir: str | None = None, revision: str = "main"
) -> tuple[ModelShape, str]:
    """A model's shape and its source: the model's folder, the hub's cache, or the table.

    Nothing is downloaded.

    Of a multimodal model it is the text model's.

    Raises:
        UserError: the model is in none of them, or its config.json lacks a size.
    """
    path = Path(name).expanduser() / "config.json"
    source = str(path)
    if not path.is_file():
        cached = _cached_config(name, cache_dir, revision)
        path, source = cached or path, f"the hub's cache, {cached}"
    if path.is_file():
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"model_name_or_path: {path} cannot be read ({error})") from None
        if not isinstance(data, dict):
            raise UserError(f"model_name_or_path: {path} is not a JSON object; replace it")
        if "text_config" in data:
            source += (
                " (its text model; what else there is, such as a vision tower, is not counted)"
            )
        return from_config(data, str(path)), source
    found = from_table(name)
    if found is None:
        raise UserError(
            f"model_name_or_path: the shape of {name} is unknown: it is no local folder with a "
            "config.json, not in the hub's cache, and not in fastppo's table; put its config.json "
            "into a folder and name that"
        )
    return found[0], f"fastppo's table, {found[1]}"


def _cached_config(name: str, cache_dir: str | None, revision: str) -> Path | None:
    """Path of the config.json of a hub model that was downloaded before; None if it was not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    except HFValidationError:  # a path, and not owner/name
        return None
    return Path(found) if isinstance(found, str) else None
