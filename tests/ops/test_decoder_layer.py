"""A decoder layer in one call: transformers' own layers, and the same to the bit in any batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from fastppo.ops import native_library
from fastppo.ops.decoder_layer import LINEARS, DecoderLayer, Norm
from fastppo.ops.few_rows import FewRows

pytestmark = pytest.mark.skipif(
    native_library.LIBRARY is None, reason=f"no native kernels: {native_library.OBSTACLE}"
)
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,  # half a head is no whole register of any width but the narrowest
    "_attn_implementation": "eager",
}
KINDS = {
    "llama": (LlamaConfig, LlamaDecoderLayer),
    "mistral": (MistralConfig, MistralDecoderLayer),
    "qwen2": (Qwen2Config, Qwen2DecoderLayer),  # biases
    "qwen3": (Qwen3Config, Qwen3DecoderLayer),  # norms of heads
}
ROWS, PLACES, WIDTH = 5, 7, 12


def make(kind, **changes):
    """A layer of transformers with random weights, norms and biases too, and ours of it."""
    torch.manual_seed(0)
    config, layer = KINDS[kind]
    own = layer(config(**{**SIZES, **changes}), 0).eval()
    for parameter in own.parameters():
        nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.3)
    attention = own.self_attn
    layers = {n: getattr(attention if n in "qkvo" else own.mlp, f"{n}_proj") for n in LINEARS}
    norms = [own.input_layernorm, own.post_attention_layernorm]
    if kind == "qwen3":
        norms += [attention.q_norm, attention.k_norm]
    made = [Norm(norm.weight, norm.variance_epsilon) for norm in norms]
    native = DecoderLayer(
        {name: FewRows(layer.weight, layer.bias) for name, layer in layers.items()},
        made[0],
        made[1],
        (made[2], made[3]) if len(made) > 2 else None,
        size=attention.head_dim,
        scale=attention.scaling,
    )
    return own, native


def operands(size=SIZES["head_dim"], heads=2):
    """A step's inputs; each row begins at a place of its own, and the cache holds NaN elsewhere."""
    torch.manual_seed(1)
    x = torch.randn(ROWS, 1, SIZES["hidden_size"])
    angle = torch.rand(ROWS, 1, size // 2).repeat(1, 1, 2) * 6
    first_B = torch.tensor([0, 3, PLACES - 1, 1, PLACES])  # the last row has its new token alone
    cache = torch.full((2, ROWS, heads, WIDTH, size), torch.nan)
    for row, first in enumerate(first_B.tolist()):
        cache[:, row, :, 2 + first : 2 + PLACES] = torch.randn(2, heads, PLACES - first, size)
    return x, (angle.cos(), angle.sin()), cache, first_B


def run(native, x, rotary, cache, first_B, rows=slice(None)):
    own = tuple(part.clone() for part in cache[:, rows])
    rotary = tuple(part[rows] for part in rotary)
    return native(x[rows], rotary, own, (2, 2 + PLACES), first_B[rows].contiguous()), own


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_transformers_layer(kind, isa):
    """Row by row, without padding, in float64."""
    own, native = make(kind)
    x, rotary, cache, first_B = operands()
    found, (keys, values) = run(native, x, rotary, cache, first_B)
    exact = own.double()
    for row, first in enumerate(first_B.tolist()):
        past = DynamicCache()
        before = cache[:, row : row + 1, :, 2 + first : 2 + PLACES].double()
        past.update(before[0], before[1], 0)
        want = exact(
            x[row : row + 1].double(),
            position_embeddings=tuple(part[row : row + 1].double() for part in rotary),
            past_key_values=past,
        )
        torch.testing.assert_close(found[row : row + 1].double(), want, atol=2e-5, rtol=2e-5)
        layer = past.layers[0]
        for written, full in ((keys, layer.keys), (values, layer.values)):
            place = written[row, :, 2 + PLACES].double()
            torch.testing.assert_close(place, full[0, :, -1], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_a_row_is_the_same_bits_alone_and_in_a_batch(isa):
    _, native = make("qwen3")
    given = operands()
    together, (keys, values) = run(native, *given)
    for row in range(ROWS):
        alone, (key, value) = run(native, *given, rows=slice(row, row + 1))
        assert torch.equal(alone[0], together[row])
        assert torch.equal(key[0, :, 2 + PLACES], keys[row, :, 2 + PLACES])
        assert torch.equal(value[0, :, 2 + PLACES], values[row, :, 2 + PLACES])


@torch.no_grad()
def test_it_writes_the_new_tokens_place_and_no_other(isa):
    _, native = make("llama")
    given = operands()
    _, written = run(native, *given)
    for before, after in zip(given[2], written, strict=True):
        same = after == before
        same |= after.isnan() & before.isnan()
        assert not same[:, :, 2 + PLACES].any()
        same[:, :, 2 + PLACES] = True
        assert same.all()


@torch.no_grad()
@pytest.mark.parametrize("gate", [-200.0, -88.0, 0.0, 88.0, 200.0])
def test_a_gate_of_any_size_is_silu(gate, isa):
    """exp(-g) overflows below -88: silu is 0 there, and g far above."""
    own, native = make("llama", mlp_bias=True)
    own.mlp.gate_proj.weight.zero_()
    own.mlp.gate_proj.bias.fill_(gate)
    x, rotary, cache, first_B = operands()
    found, _ = run(native, x, rotary, cache, first_B)
    row = slice(4, 5)
    want = own(x[row], position_embeddings=tuple(part[row] for part in rotary))
    torch.testing.assert_close(found[row], want, atol=1e-4, rtol=1e-4)


def test_what_it_cannot_run_is_seen():
    _, native = make("llama")
    x, (cos, _), cache, _ = operands()
    keys = cache[0]
    assert not native.suits(x, cos, keys)  # a gradient is wanted
    with torch.no_grad():
        assert native.suits(x, cos, keys)
        assert not native.suits(x.double(), cos, keys)
        assert not native.suits(x, cos, keys.bfloat16())
        assert not native.suits(x.repeat(1, 2, 1), cos, keys)  # two tokens a row
        assert not native.suits(x.repeat(9, 1, 1), cos, keys)  # 45 rows
        assert not native.suits(x, cos[..., :10], keys)  # rotary over half a head
        with torch.autocast("cpu", torch.bfloat16):
            assert not native.suits(x, cos, keys)
