"""Bytes of a pass through a trunk: what its layers allocate, and what they keep for a backward."""

from __future__ import annotations

from dataclasses import dataclass

from fastppo.memory.layer import Decoder, LayerSetting
from fastppo.memory.shapes import ModelShape
from fastppo.memory.tape import Value


@dataclass(frozen=True)
class TrunkMemory:
    """Bytes of a pass through the trunk, for one micro-batch.

    Attributes:
        fixed: cos, sin, ids and mask, which exist during the whole pass.
        input: a layer's input, which checkpointing keeps.
        saved: what a layer keeps for its backward without checkpointing, including its input.
        saved_first: the same for the lowest layer that trains, whose input needs no gradient.
        norm_saved: what the last norm keeps.
        forward: peak of a layer that keeps nothing, including its input and the embeddings.
        forward_kept: peak of a layer that keeps `saved`, including its input and the embeddings.
        backward: peak of the backward of the last norm and the last layer, without checkpointing.
        norm_backward: peak of the last norm's backward alone.
        recompute: peak of a checkpointed layer's backward, which runs its forward again.
    """

    fixed: int
    input: int
    saved: int
    saved_first: int
    norm_saved: int
    forward: int
    forward_kept: int
    backward: int
    norm_backward: int
    recompute: int


def trunk_memory(shape: ModelShape, setting: LayerSetting) -> TrunkMemory:
    """The bytes that a trunk of this shape allocates if it runs with this setting."""
    plain = Decoder(shape, setting, grad=False)
    x = plain.input()
    size = x.size.bytes
    plain.layer(x)

    first = Decoder(shape, setting, grad=True)
    out = first.layer(first.input(first=True))
    saved_first = first.ledger.now - out.size.bytes

    kept = Decoder(shape, setting, grad=True)
    x = kept.input()
    out = kept.layer(x)
    forward_kept = kept.ledger.peak
    del x
    saved = kept.ledger.now - out.size.bytes
    out = kept.norm(out)
    norm_saved = kept.ledger.now - saved - out.size.bytes
    backward = _backward_peak(kept, out)

    norm = Decoder(shape, setting, grad=True)
    out = norm.norm(norm.input())
    norm_backward = _backward_peak(norm, out)

    again = Decoder(shape, setting, grad=True)
    x, grad = again.input(), [again.gradient()]
    out = again.layer(x)
    node = out.node
    assert node is not None
    del out
    again.backward(node, grad)

    tokens, length = setting.tokens, setting.length
    eager = setting.eager or shape.softcapped
    kinds = 2 if 0 < shape.sliding_layers < shape.layers else 1
    mask = kinds * tokens * length * (setting.item if eager else setting.masked)
    return TrunkMemory(
        fixed=2 * length * shape.head_dim * setting.item + 16 * tokens + mask,
        input=size,
        saved=saved,
        saved_first=saved_first,
        norm_saved=norm_saved,
        forward=plain.ledger.peak + size,
        forward_kept=forward_kept + size,
        backward=backward,
        norm_backward=norm_backward,
        recompute=again.ledger.peak,
    )


def _backward_peak(tape: Decoder, out: Value) -> int:
    """Peak of a backward from `out` after `out` itself has been freed, as after a gather."""
    node = out.node
    assert node is not None
    tape.ledger.peak = 0
    out.size = tape.ledger.size(0)
    tape.backward(node, [tape.gradient()])
    return tape.ledger.peak
