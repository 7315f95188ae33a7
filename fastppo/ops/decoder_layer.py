"""A decoder layer of Llama's kind on one new token a row, on a CPU, in one call.

In PyTorch it is about 25 calls, which for the few rows of a step of decoding take as long as the
products themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import byref
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fastppo.ops.few_rows import MOST_ROWS, FewRows
from fastppo.ops.native_library import LIBRARY, DecoderLayerStruct

LINEARS: Final = ("q", "k", "v", "o", "gate", "up", "down")


class Norm(NamedTuple):
    """An RMS norm: x weight / sqrt(mean(x^2) + eps)."""

    weight_D: Tensor
    eps: float


class DecoderLayer:
    """x + o(attention(q, k, v of norm(x))), then that plus down(silu(gate) up) of its norm.

    Prepared once, because making the struct anew takes longer than some of the products. Weights
    must not be replaced while this is in use. All are float32, of one CPU.

    A row's result does not depend on other rows: it is the same bits in any batch.

    Args:
        linears: by the names of `LINEARS`.
        norm: before the attention.
        post_norm: before the gated unit.
        head_norms: of each head's queries and keys, or None.
        size: numbers of a head.
        scale: factor of queries times keys.
    """

    def __init__(
        self,
        linears: Mapping[str, FewRows],
        norm: Norm,
        post_norm: Norm,
        head_norms: tuple[Norm, Norm] | None,
        *,
        size: int,
        scale: float,
    ) -> None:
        self.kept = (dict(linears), norm, post_norm, head_norms)
        outputs = {name: linears[name].outputs for name in LINEARS}
        self.width, self.size = linears["q"].inputs, size
        self.work = (
            self.width
            + sum(outputs[name] for name in ("q", "k", "v", "up"))
            + max(outputs["gate"], outputs["q"])
        )
        layer = DecoderLayerStruct(
            norm=norm.weight_D.data_ptr(), post_norm=post_norm.weight_D.data_ptr(), eps=norm.eps
        )
        for name in LINEARS:
            setattr(layer, name, linears[name].arguments)
        if head_norms is not None:
            layer.q_norm, layer.k_norm = (own.weight_D.data_ptr() for own in head_norms)
            layer.head_eps = head_norms[0].eps
        layer.attention.heads = outputs["q"] // size
        layer.attention.kv_heads = outputs["k"] // size
        layer.attention.size = layer.attention.value_size = size
        layer.attention.scale = scale
        self.arguments, self.reference = layer, byref(layer)

    def suits(self, x: Tensor, cos: Tensor, keys: Tensor) -> bool:
        """Whether it can run these: a token a row, few rows, float32, rotary over a whole head."""
        return (
            x.dtype is torch.float32
            and keys.dtype is torch.float32
            and cos.dtype is torch.float32
            and x.shape[1] == 1
            and x.shape[0] <= MOST_ROWS
            and cos.shape[-1] == self.size
            and x.is_contiguous()
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )

    def __call__(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        places: tuple[int, int],
        first_B: Tensor,
    ) -> Tensor:
        """The layer's result, (B, 1, width); keys and values of the token are written.

        Args:
            x: (B, 1, width).
            rotary: cosines and sines, (B or 1, 1, size).
            cache: keys and values, (slots, heads, width of the cache, size), of which the first B
                slots are the rows.
            places: the first place of the longest row, and the new token's.
            first_B: int64, the first of the places from there on that each row attends to.
        """
        rows, (start, end) = x.shape[0], places
        cos, sin = (own if own.is_contiguous() else own.contiguous() for own in rotary)
        keys, values = cache
        out, work = torch.empty_like(x), torch.empty(rows * self.work)
        layer = self.arguments
        attention = layer.attention
        layer.x, layer.out, layer.work = x.data_ptr(), out.data_ptr(), work.data_ptr()
        layer.cos, layer.sin = cos.data_ptr(), sin.data_ptr()
        layer.rotary_row = self.size if cos.shape[0] > 1 else 0
        skipped = 4 * start * self.size
        attention.keys, attention.values = keys.data_ptr() + skipped, values.data_ptr() + skipped
        attention.key_row, attention.key_head = keys.stride(0), keys.stride(1)
        attention.value_row, attention.value_head = values.stride(0), values.stride(1)
        attention.first, attention.rows = first_B.data_ptr(), rows
        attention.places = end - start + 1
        LIBRARY.fastppo_decoder_layer(self.reference)
        return out
