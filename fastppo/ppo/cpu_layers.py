"""Faster layers for sampling on CPUs; they are put in for a rollout and taken out after it.

A step of decoding runs hundreds of small layers on a few rows. A linear layer reads its weight
once; a layer with a merged adapter is its base; and a decoder layer of Llama's kind is one call in
place of 25. Its norms are those of `models.native_layers`.

Attention is a native kernel in `slot_attention`: a row reads its own tokens in the sampler's cache,
without a mask. transformers' models call the attention that their config names; what the kernel
cannot do raises `Unsuited`, and the step is run with the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface

from fastppo.models.native_layers import SILU, NativeNorm, is_native
from fastppo.ops import backend
from fastppo.ops.decode_attention import decode_attention, suits
from fastppo.ops.decoder_layer import LINEARS, DecoderLayer, Norm
from fastppo.ops.few_rows import FewRows, runs_native
from fastppo.ppo.slots import SlotCache, SlotLayer

# The modules of a decoder layer that `DecoderLayer` computes, without its activation.
PARTS: Final = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
HEAD_NORMS: Final = ("q_norm", "k_norm")
# What other layers with modules of these names do besides.
OTHERS: Final = ("attn_logit_softcapping", "clip_qkv")
NAME: Final = "fastppo_slots"
# What else models pass to their attention, and what says nothing about its result here.
IGNORED: Final = frozenset(
    {
        "cache_position",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


class FastLinear:
    """y = x W^T + b: by the native kernel if x has few rows, as in decoding, else by PyTorch."""

    def __init__(self, layer: nn.Linear) -> None:
        self.few_rows = FewRows(layer.weight, layer.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if self.few_rows.suits(x):
            return self.few_rows(x)
        return nn.functional.linear(x, self.few_rows.weight, self.few_rows.bias)


class FastDecoderLayer:
    """A step of decoding by the native kernel; all else by the layer's `own` forward.

    The first step of a layer is run by both: where they differ, the layer's own stays.
    """

    # Layers that have been compared, and whether they are what the kernel computes.
    compared: ClassVar[WeakKeyDictionary[nn.Module, bool]] = WeakKeyDictionary()

    def __init__(self, module: Any, native: DecoderLayer) -> None:
        self.module, self.own, self.native = module, module.forward, native
        self.number: int = module.self_attn.layer_idx

    def __call__(self, hidden_states: Tensor, **others: Any) -> Any:
        layer = self.slot_layer(hidden_states, others)
        alike = self.compared.get(self.module)
        if layer is None or alike is False:
            return self.own(hidden_states, **others)
        if alike is None:
            found = self.step(hidden_states, others, layer)
            own = self.own(hidden_states, **others)  # writes keys and values anew
            alike = isinstance(own, Tensor) and bool(
                (found - own).abs().max() <= 1e-4 * own.abs().max()
            )
            self.compared[self.module] = alike
            if not alike:
                return own
        else:
            layer.extent.attended += 1
        return self.step(hidden_states, others, layer)

    def slot_layer(self, x: Tensor, others: Mapping[str, Any]) -> SlotLayer | None:
        """Where the rows' keys and values are, if this is a step that the kernel can run."""
        cache, rotary = others.get("past_key_values"), others.get("position_embeddings")
        if not isinstance(cache, SlotCache) or not cache.extent.first or rotary is None:
            return None
        layer = cache.slot_layers[self.number]
        if others.get("attention_mask") is not None or not layer.is_initialized:
            return None
        return layer if self.native.suits(x, rotary[0], layer.keys) else None

    def step(self, x: Tensor, others: Mapping[str, Any], layer: SlotLayer) -> Tensor:
        extent = layer.extent
        return self.native(
            x,
            others["position_embeddings"],
            (layer.keys, layer.values),
            (extent.start, extent.end),
            extent.first[layer.window],
        )


def without_adapter(layer: Any) -> nn.Linear | None:
    """The base of a LoRA layer if that is all it computes: merged, or adapters off."""
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else None
    if not isinstance(base, nn.Linear) or type(base) is not nn.Linear:
        return None
    return base if layer.merged != layer.disable_adapters else None


def fast_linear(module: Any) -> FastLinear | None:
    """The forward that replaces a linear layer's own; None if none does."""
    # A streamed layer has a forward of its own, which copies its weight: leave it.
    base = without_adapter(module)
    if base is None and type(module) is nn.Linear:
        base = module
    if base is None or "forward" in vars(base) or not runs_native(base.weight):
        return None
    return FastLinear(base)


def norm_of(module: nn.Module) -> Norm | None:
    """The norm that the module computes by a native kernel; None if it does not."""
    forward = vars(module).get("forward")
    return forward.norm if isinstance(forward, NativeNorm) else None


def children(module: nn.Module) -> set[str]:
    """The names of the modules in `module`; without those that have no weights."""
    return {
        name for name, child in module.named_children() if any(True for _ in child.parameters())
    }


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a call without gradient runs the forward of the module's class.

    A layer whose activations are checkpointed or offloaded has another, which then calls that one.
    """
    forward = vars(module).get("forward")
    forward = getattr(forward, "without_gradient", forward)
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def is_plain(module: Any) -> bool:
    """Whether the decoder layer has Llama's modules, and nothing of its own besides."""
    if children(module) != PARTS or not runs_own_forward(module):
        return False
    attention, mlp = module.self_attn, module.mlp
    known = {f"{name}_proj" for name in LINEARS} | set(HEAD_NORMS)
    owners = (attention, getattr(attention, "config", None))
    return (
        children(attention) | children(mlp) <= known
        and all(hasattr(attention, name) for name in ("head_dim", "scaling", "layer_idx"))
        and not any(
            True for part in (module, attention, mlp) for _ in part.parameters(recurse=False)
        )
        and not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
        and not any(getattr(owner, name, None) for owner in owners for name in OTHERS)
        and type(getattr(mlp, "act_fn", None)).__name__ in SILU
    )


def decoder_layer(module: Any, fast: Mapping[Any, Any]) -> FastDecoderLayer | None:
    """The native forward of a decoder layer whose linear layers are in `fast`."""
    if not is_plain(module):
        return None
    attention, mlp = module.self_attn, module.mlp
    linears: dict[str, FewRows] = {}
    for name in LINEARS:
        layer = fast.get(getattr(attention if name in LINEARS[:4] else mlp, f"{name}_proj", None))
        if not isinstance(layer, FastLinear) or layer.few_rows.dtype is not torch.float32:
            return None
        linears[name] = layer.few_rows
    own = [module.input_layernorm, module.post_attention_layernorm]
    own += [getattr(attention, name) for name in HEAD_NORMS if hasattr(attention, name)]
    norms = [norm for norm in map(norm_of, own) if norm is not None and is_native(norm.weight_D)]
    if len(norms) < len(own) or len(own) not in (2, 4):
        return None
    size, (first, second, *of_heads) = attention.head_dim, norms
    if any(norm.weight_D.numel() != size or norm.eps != of_heads[0].eps for norm in of_heads):
        return None
    head_norms = (of_heads[0], of_heads[1]) if of_heads else None
    native = DecoderLayer(linears, first, second, head_norms, size=size, scale=attention.scaling)
    return FastDecoderLayer(module, native)


@contextmanager
def use_cpu_layers(model: nn.Module) -> Iterator[None]:
    """Inside the block the layers of `model` run as this module has them.

    Without native kernels (on a GPU, with FASTPPO_BACKEND=torch) nothing changes.
    """
    made = {module: fast_linear(module) for module in model.modules()}
    fast: dict[nn.Module, Callable[..., Any]] = {m: f for m, f in made.items() if f is not None}
    layers = {module: decoder_layer(module, fast) for module in made} if fast else {}
    fast |= {m: layer for m, layer in layers.items() if layer is not None}
    changed: list[tuple[Any, Any]] = []
    try:
        module: Any
        for module, forward in fast.items():
            changed.append((module, vars(module).get("forward")))
            module.forward = forward
        yield
    finally:
        for module, before in changed:
            if before is None:
                del module.forward
            else:
                module.forward = before


class Unsuited(Exception):
    """The model's attention has a part that the kernel has not."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers' models, over the views that `SlotLayer` returns."""
    layer: SlotLayer | None = getattr(key, "slot_layer", None)
    if layer is None or attention_mask is not None or not suits(key, value):
        raise Unsuited(type(module).__name__)
    if sliding_window not in (None, layer.window):
        raise Unsuited(type(module).__name__)
    if any(x is not None for name, x in others.items() if name not in IGNORED):
        raise Unsuited(type(module).__name__)
    layer.extent.attended += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    first_B = layer.extent.first[layer.window]
    return decode_attention(query, key, value, first_B, scale=scale, softcap=softcap), None


AttentionInterface.register(NAME, attention)


def can_run(base: Any, cache: SlotCache) -> bool:
    """Whether to try: on a CPU with the native kernels, if the model's attention can be named."""
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    key = cache.slot_layers[0].keys
    return (
        key.device.type == "cpu"
        and backend.choose("linear", None, key) == "native"
        and bool(getattr(base, "_supports_attention_backend", False))
        and kinds <= {"full_attention", "sliding_attention"}
    )


@contextmanager
def slot_attention(base: Any, cache: SlotCache, lengths: list[int]) -> Iterator[None]:
    """Inside the block a forward of one token a row attends to the rows' own tokens.

    Raises:
        Unsuited: the model has called another attention too, or with what the kernel cannot do.
    """
    config, extent = base.config.get_text_config(), cache.extent
    own_B = torch.tensor([extent.longest - n for n in lengths])
    extent.first = {
        window: own_B if window is None else own_B.clamp(min=extent.longest - window + 1)
        for window in {layer.window for layer in cache.slot_layers}
    }
    extent.attended = 0
    before, config._attn_implementation_internal = config._attn_implementation_internal, NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        extent.first = {}
    if extent.attended != len(cache.slot_layers):
        raise Unsuited(type(base).__name__)
