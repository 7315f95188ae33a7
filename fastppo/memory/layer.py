"""Simulate the bytes that a decoder layer allocates, op by op as transformers and PEFT run it.

It covers Llama, Qwen, Mistral, and Gemma with its additional norms. A simulated forward and
backward gives the bytes saved for the backward and the peak. Local variables must live as long here
as in transformers, because a `Size` is counted until its last reference is gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastppo.memory.shapes import ModelShape
from fastppo.memory.tape import FLOAT32, Node, Size, Tape, Value


@dataclass(frozen=True)
class LayerSetting:
    """How a layer runs.

    Attributes:
        rows, length: the micro-batch has rows x length tokens.
        item: bytes per element of the base, and of what autocast computes in.
        rank: rank of the active adapter; 0 if there is none.
        target: the adapter's `lora_target`.
        fused: whether plain LoRA layers run by `fastppo.models.lora`.
        native: whether norms and gated MLPs run by `fastppo.models.native_layers`.
        adapter_item: bytes per element of the adapter.
        trains_base: whether the layer's own weights train.
        masked: whether there is padding: attention needs a mask, and keys and values of every head.
        eager: whether attention keeps its probabilities.
        dora: whether the adapter is DoRA.
    """

    rows: int
    length: int
    item: int
    rank: int = 0
    fused: bool = False
    native: bool = False
    target: str = "all"
    adapter_item: int = FLOAT32
    trains_base: bool = False
    masked: bool = False
    eager: bool = False
    dora: bool = False

    @property
    def tokens(self) -> int:
        """Padded tokens in the micro-batch."""
        return self.rows * self.length


class Decoder(Tape):
    """A tape with the modules of a decoder layer."""

    def __init__(self, shape: ModelShape, setting: LayerSetting, *, grad: bool) -> None:
        super().__init__(setting.tokens, grad=grad)
        self.shape, self.setting = shape, setting
        self.targets = shape.targets(setting.target) if setting.rank else {}

    def linear(self, x: Value, name: str) -> Value:
        """PEFT's Linear: base(x) + B(A(x)) * scaling; x is not cast, see `disable_input_cast`."""
        setting, (wide, out) = self.setting, self.shape.linears[name]
        plain = setting.fused and not setting.dora and not setting.trains_base
        if plain and name in self.targets:
            return self.fused_linear(x, wide, out)
        saved = [x] if setting.trains_base else []
        gives = self.gives((wide, setting.item))
        result = self.op(out, setting.item, [x], gives, saved, trains=setting.trains_base)
        if name not in self.targets:
            return result
        if setting.dora:
            return self.dora(x, result, name)
        rank, item = setting.rank, setting.item
        low = self.op(rank, item, [x], gives, [x], trains=True)
        up = self.op(out, item, [low], self.gives((rank, item)), [low], trains=True)
        del low
        scaled = self.scaled(up)
        del up
        return self.add(result, scaled)

    def fused_linear(self, x: Value, wide: int, out: int) -> Value:
        """LoRA as `fastppo.models.lora` runs it: A(x) is saved, B(A(x)) never exists."""
        rank, item = self.setting.rank, self.setting.item
        low = self.new(rank, item)

        def backward(_: Size) -> list[Size]:
            d_low = self.new(rank, item)
            d_x = self.new(wide, item)
            del d_low
            return [d_x]

        result = self.op(out, item, [x], backward, [x], trains=True)
        if result.node is not None:
            result.node.saved.append(low)
        return result

    def dora(self, x: Value, result: Value, name: str) -> Value:
        """PEFT's DoRA: magnitude / norm of the merged weight, made in the adapter's dtype."""
        (wide, out), setting = self.shape.linears[name], self.setting
        rank, item, own = setting.rank, setting.item, setting.adapter_item
        x = self.cast(x, own)
        _held = self.merged_norm(wide, out)
        low_in = self.cast(x, item)
        low = self.op(rank, item, [low_in], self.gives((wide, item)), [low_in], trains=True)
        del low_in
        up = self.op(out, item, [low], self.gives((rank, item)), [low], trains=True)
        del low
        bare = result
        if self.shape.qkv_bias and name in ("q_proj", "k_proj", "v_proj"):
            bare = Value(self.new(out, item), out, item)

        def magnitude_backward(_: Size) -> list[Size]:
            self.new(out, own)  # the gradient times the other factor, before the sum
            return []

        def product_backward(grad: Size) -> list[Size]:
            magnitude_backward(grad)
            wide_grad = self.new(out, own)
            return [wide_grad if item == own else self.new(out, item)]

        straight = self.op(out, own, [], magnitude_backward, [bare], trains=True)
        del bare
        product = self.op(out, own, [up], product_backward, [up], trains=True)
        product = self.scaled(product)
        added = self.add(straight, product)
        del straight, product, up, _held
        return self.cast(self.add(added, result), item)

    def merged_norm(self, wide: int, out: int) -> list[Size]:
        """Norm of the merged weight: the adapter applied to the identity, plus the base's weight.

        Returns:
            The allocations that live until the linear layer is done.
        """
        setting, size = self.setting, self.ledger.size
        item, own, square = setting.item, setting.adapter_item, wide * wide
        held = []
        eye = size(square * own)
        narrow = size(square * item) if item != own else eye
        low = size(wide * setting.rank * item)
        lora_weight = size(wide * out * item)
        if self.grad:  # autograd builds a graph, though the weight needs no gradient
            held += [narrow, low]
        del eye, narrow, low
        if item != own:
            wider = size(wide * out * own)
            lora_weight = wider
            del wider
            held.append(size(wide * out * own))  # the base's weight, converted
        held.append(lora_weight)
        del lora_weight
        scaled = size(wide * out * own)
        total = size(wide * out * own)
        del scaled, total
        return held

    def norm(self, x: Value) -> Value:
        """RMSNorm: computed in float32, cast back, then multiplied by the weight."""
        if self.setting.native and self.shape.rms:
            return self.native_norm(x)
        trains = self.setting.trains_base
        wide = self.cast(x, FLOAT32)
        width = wide.width
        # x^2 is freed after its mean; 1/rms is one number per token.

        def square_backward(_: Size) -> list[Size]:
            power = self.new(width, FLOAT32)
            doubled = self.new(width, FLOAT32)
            del power
            result = self.new(width, FLOAT32)
            del doubled
            return [result]

        square = self.op(width, FLOAT32, [wide], square_backward, [wide])
        mean = self.op(1, FLOAT32, [square], self.gives((width, FLOAT32)))
        del square
        inverse = self.op(1, FLOAT32, [mean], self.gives((1, FLOAT32)))
        del mean
        if inverse.node is not None:
            inverse.node.saved.append(inverse.size)

        def product_backward(_: Size) -> list[Size]:
            straight, reduced = self.new(width, FLOAT32), self.new(width, FLOAT32)
            del reduced
            return [straight, self.new(1, FLOAT32)]

        normed = self.op(width, FLOAT32, [wide, inverse], product_backward, [wide, inverse])
        del wide, inverse
        back = self.cast(normed, x.item)
        kept = [back] if trains else []
        size = (back.width, back.item)
        return self.op(*size, [back], self.gives(size), kept, trains=trains)

    def native_norm(self, x: Value) -> Value:
        """RMSNorm in one pass; the gradient of its weight is of a product of its size."""
        trains, size = self.setting.trains_base, (x.width, x.item)

        def backward(_: Size) -> list[Size]:
            d_x = self.new(*size)
            if trains:
                self.new(*size)
            return [d_x]

        return self.op(*size, [x], backward, [x], trains=trains)

    def rotate(self, x: Value) -> Value:
        """Rotary embedding: x * cos + rotate_half(x) * sin; all layers share cos and sin."""
        width, item = x.width, x.item

        def turned_backward(_: Size) -> list[Size]:
            half = self.ledger.size(self.tokens * width * item // 2)
            first = self.new(width, item)
            del half
            second = self.new(width, item)
            del second
            return [first]

        straight = self.scaled(x)
        half = self.ledger.size(self.tokens * width * item // 2)
        turned = self.op(width, item, [x], turned_backward)
        del half
        crossed = self.scaled(turned)
        del turned
        return self.add(straight, crossed)

    def every_head(self, x: Value) -> Value:
        """Keys or values copied for every query head; a single head is expanded without a copy."""
        if self.shape.kv_heads in (1, self.shape.heads):
            return x
        width = self.shape.heads * self.shape.head_dim
        return self.op(width, x.item, [x], self.gives((x.width, x.item)))

    def attention(self, q: Value, k: Value, v: Value) -> Value:
        """Attention by one fused kernel, with a mask if there is padding."""
        setting, item = self.setting, q.item
        if setting.masked:
            k, v = self.every_head(k), self.every_head(v)
        kernel = [self.new(self.shape.heads, FLOAT32)]  # log-sum-exp
        if setting.masked:  # the bool mask in the queries' dtype
            kernel.append(self.new(setting.length, item))
        gives = self.gives(*((x.width, item) for x in (q, k, v)))
        out = self.op(q.width, item, [q, k, v], gives, [q, k, v])
        if out.node is not None:
            out.node.saved += [out.size, *kernel]
        return out

    def eager_attention(self, q: Value, k: Value, v: Value) -> tuple[Value, Value]:
        """Eager attention, which allocates the probabilities in float32 and in the base's dtype."""
        item, width = q.item, self.shape.heads * self.setting.length
        k, v = self.every_head(k), self.every_head(v)
        sizes = ((q.width, item), (k.width, item))
        weights = self.op(width, item, [q, k], self.gives(*sizes), [q, k])
        weights = self.scaled(weights)
        if self.shape.softcapped:
            weights = self.scaled(weights)
            weights = self.op(width, item, [weights], self.gives((width, item)))
            if weights.node is not None:
                weights.node.saved.append(weights.size)
            weights = self.scaled(weights)
        weights = self.scaled(weights)  # the mask is added
        # softmax converts its input first; the logits still exist when it is done.
        wide = self.cast(weights, FLOAT32)
        probabilities = self.op(width, FLOAT32, [wide], self.gives((width, FLOAT32)))
        del wide
        if probabilities.node is not None:
            probabilities.node.saved.append(probabilities.size)
        weights = self.cast(probabilities, item)
        del probabilities
        sizes = ((width, item), (v.width, item))
        out = self.op(q.width, item, [weights, v], self.gives(*sizes), [weights, v])
        return self.scaled(out), weights  # the copy that makes it contiguous

    def layer(self, x: Value) -> Value:
        """A decoder layer; local variables live as long as in transformers' forward."""
        residual = x
        hidden = self.norm(x)
        hidden, _weights = self.self_attention(hidden)
        if self.shape.norms > 2:
            hidden = self.norm(hidden)
        hidden = self.add(residual, hidden)
        residual = hidden
        hidden = self.norm(hidden)
        hidden = self.mlp(hidden)
        if self.shape.norms > 2:
            hidden = self.norm(hidden)
        return self.add(residual, hidden)

    def self_attention(self, hidden: Value) -> tuple[Value, Value | None]:
        """The attention module; returns its output and, with eager attention, the probabilities."""
        q = self.linear(hidden, "q_proj")
        k = self.linear(hidden, "k_proj")
        if self.shape.qk_norm:
            q, k = self.norm(q), self.norm(k)
        v = self.linear(hidden, "v_proj")
        turned_q = self.rotate(q)
        turned_k = self.rotate(k)
        q, k = turned_q, turned_k
        del turned_q, turned_k
        weights = None
        if self.setting.eager or self.shape.softcapped:
            out, weights = self.eager_attention(q, k, v)
        else:
            out = self.attention(q, k, v)
        return self.linear(out, "o_proj"), weights

    def mlp(self, x: Value) -> Value:
        """down(act(gate(x)) * up(x))."""
        gate = self.linear(x, "gate_proj")
        size = (gate.width, gate.item)
        if self.setting.native and self.shape.silu:
            up = self.linear(x, "up_proj")
            product = self.op(*size, [gate, up], self.gives(size, size), [gate, up])
            del gate, up
            return self.linear(product, "down_proj")
        act = self.op(*size, [gate], self.gives(size), [gate])
        del gate
        up = self.linear(x, "up_proj")
        product = self.times(act, up)
        del act, up
        return self.linear(product, "down_proj")

    def input(self, *, first: bool = False) -> Value:
        """The layer's input; it requires a gradient, except in the `first` layer that trains."""
        node = Node([], lambda _: []) if self.grad and not first else None
        width, item = self.shape.hidden, self.setting.item
        return Value(self.new(width, item), width, item, node)

    def gradient(self) -> Size:
        """A gradient of the hidden states."""
        return self.new(self.shape.hidden, self.setting.item)
