"""Attention over slots in a step of decoding on a CPU: a row reads its own tokens, without a mask.

transformers' models call the attention that their config names. Inside `slot_attention` that is the
native kernel here; what it cannot do raises `Unsuited`, and the step is run with the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fastppo.ops import backend
from fastppo.ops.decode_attention import decode_attention, suits
from fastppo.ppo.slots import SlotCache, SlotLayer

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
    if extent.attended != len(cache.slot_layers):
        raise Unsuited(type(base).__name__)
