"""The sizes of a language model, from its config.json or a table of facts; no weights, no torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastppo.config.model import own_dtype
from fastppo.config.published import text_part
from fastppo.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on in a decoder with gated MLPs and grouped-query attention."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool  # one matrix is both embedding and head
    qkv_bias: bool = False
    qk_norm: bool = False  # a norm over each query and key head
    norms: int = 2  # a layer's norms over the hidden size; Gemma has 4
    softcapped: bool = False  # attention logits have a softcap, and so no fused kernel
    sliding_layers: int = 0  # layers that attend to `window` tokens and cache no more
    window: int = 0
    dtype: str = "bfloat16"  # that of the published weights

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (in, out) of a layer's linear layers."""
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
        """Weights of all linear layers below the head: what quantisation shrinks."""
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def layer_parameters(self) -> int:
        """One decoder layer."""
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim * self.qkv_bias
        norms = self.norms * self.hidden + 2 * self.head_dim * self.qk_norm
        return self.linear_parameters // self.layers + bias + norms

    @property
    def embedding_parameters(self) -> int:
        """The embedding, or the head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """The whole model; a tied head is counted once."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        return embeddings + self.layers * self.layer_parameters + self.hidden

    def cached_tokens(self, length: int) -> int:
        """Tokens of keys and values over all layers, for a sequence of `length`."""
        full = self.layers - self.sliding_layers
        return full * length + self.sliding_layers * min(length, self.window or length)

    def lora_parameters(self, rank: int, target: str = "all", layers: int | None = None) -> int:
        """An adapter of `rank` on the linear layers that `target` names."""
        adapted = sum(rank * (a + b) for a, b in self.targets(target).values())
        return adapted * (self.layers if layers is None else min(layers, self.layers))

    def targets(self, target: str) -> dict[str, tuple[int, int]]:
        """The linear layers that `lora_target` names; a name unknown here adds nothing."""
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
        sliding_layers=layers - layers // 6,
        window=512 if hidden == 1152 else 1024,
    )


# From the published config.json files; tests hold every parameter count against the published one.
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
    "mistralai/Mistral-7B-v0.1": _llama(4096, 32, 32, 8, 14336, 32000),
    "mistralai/Mistral-7B-v0.2": _llama(4096, 32, 32, 8, 14336, 32000),
    "mistralai/Mistral-7B-v0.3": _llama(4096, 32, 32, 8, 14336, 32768),
    "google/gemma-2-2b": _gemma2(2304, 26, 8, 4, 256, 9216),
    "google/gemma-2-9b": _gemma2(3584, 42, 16, 8, 256, 14336),
    "google/gemma-2-27b": _gemma2(4608, 46, 32, 16, 128, 36864),
    # The language part alone: with images there is a vision tower beside it.
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
    """A hub name or the last part of a path, without what tells an instruct model from its base."""
    last = Path(name).name.lower().replace("meta-llama-3", "llama-3")
    return _SUFFIX.sub("", last.replace("-instruct-v", "-v"))


def from_table(name: str) -> tuple[ModelShape, str] | None:
    """The table's entry for a hub name or a folder called like one, and the entry's name."""
    for known, shape in TABLE.items():
        if _plain(known) == _plain(name):
            return shape, known
    return None


def from_config(data: dict[str, Any], where: str) -> ModelShape:
    """The shape that a config.json describes, in transformers' names."""
    own = text_part(data)
    kind = str(own.get("model_type", ""))
    try:
        hidden, heads = int(own["hidden_size"]), int(own["num_attention_heads"])
        layers = int(own["num_hidden_layers"])
        kinds = own.get("layer_types") or []
        sliding = sum(name == "sliding_attention" for name in kinds)
        return ModelShape(
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=int(own.get("num_key_value_heads") or heads),
            head_dim=int(own.get("head_dim") or hidden // heads),
            intermediate=int(own["intermediate_size"]),
            vocab=int(own["vocab_size"]),
            tied=bool(own.get("tie_word_embeddings", kind.startswith("gemma"))),
            qkv_bias=bool(own.get("attention_bias", kind == "qwen2")),
            qk_norm=kind in ("qwen3", "gemma3", "gemma3_text"),
            norms=4 if kind.startswith(("gemma2", "gemma3")) else 2,
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
    """A model's shape, and where it is from: its folder, the hub's cache, or the table. No network.

    Raises:
        UserError: the model is in none of them, or its config.json says too little.
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
    """config.json of a hub model that was downloaded before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    except HFValidationError:  # a path, and not owner/name
        return None
    return Path(found) if isinstance(found, str) else None
