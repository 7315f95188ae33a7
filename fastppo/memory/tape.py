"""Allocations without tensors: sizes that are born and die, and a tape that keeps some of them.

What torch runs eagerly, op by op: each result is a `Size` that Python frees where it would free the
tensor, and each autograd node holds what PyTorch saves for its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

FLOAT32 = 4


class Ledger:
    """Bytes alive now and at the highest."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def size(self, count: int) -> Size:
        """A new allocation."""
        return Size(self, count)


class Size:
    """An allocation: alive for as long as something refers to it."""

    __slots__ = ("bytes", "ledger")

    def __init__(self, ledger: Ledger, count: int) -> None:
        self.ledger, self.bytes = ledger, count
        ledger.now += count
        ledger.peak = max(ledger.peak, ledger.now)

    def __del__(self) -> None:
        self.ledger.now -= self.bytes


@dataclass(eq=False)
class Node:
    """An autograd node: what it saved, and what its backward allocates for each of its inputs."""

    inputs: list[Node | None]
    backward: Callable[[Size], list[Size]]
    saved: list[Size] = field(default_factory=list)


@dataclass
class Value:
    """A tensor (tokens, width) with elements of `item` bytes; a view shares its `size`."""

    size: Size
    width: int
    item: int
    node: Node | None = None


class Tape:
    """A forward pass over a number of tokens whose tensors have only sizes, and its backward."""

    def __init__(self, tokens: int, *, grad: bool) -> None:
        self.tokens, self.grad = tokens, grad
        self.ledger = Ledger()
        self.nodes: list[Node] = []

    def new(self, width: int, item: int) -> Size:
        """An allocation of a `width` a token."""
        return self.ledger.size(self.tokens * width * item)

    def op(
        self,
        width: int,
        item: int,
        inputs: list[Value],
        backward: Callable[[Size], list[Size]],
        saved: list[Value] | None = None,
        *,
        trains: bool = False,
    ) -> Value:
        """The result of an op; it has a node where an input, or a weight, wants a gradient."""
        out = Value(self.new(width, item), width, item)
        if self.grad and (trains or any(value.node for value in inputs)):
            kept = [value.size for value in saved or []]
            out.node = Node([value.node for value in inputs], backward, kept)
            self.nodes.append(out.node)
        return out

    def gives(self, *gradients: tuple[int, int]) -> Callable[[Size], list[Size]]:
        """A backward that allocates a gradient of each (width, item); it holds nothing itself."""
        return lambda _: [self.new(width, item) for width, item in gradients]

    def cast(self, x: Value, item: int) -> Value:
        """`x.to(dtype)`."""
        if x.item == item:
            return x
        return self.op(x.width, item, [x], self.gives((x.width, x.item)))

    def scaled(self, x: Value) -> Value:
        """x times something that wants no gradient and is there anyway."""
        return self.op(x.width, x.item, [x], self.gives((x.width, x.item)))

    def add(self, x: Value, y: Value) -> Value:
        """x + y: one gradient for both."""
        return self.op(x.width, x.item, [x, y], lambda grad: [grad, grad])

    def times(self, x: Value, y: Value) -> Value:
        """x * y: each is the other's gradient."""
        size = (x.width, x.item)
        return self.op(*size, [x, y], self.gives(size, size), [x, y])

    def backward(self, node: Node, grad: list[Size]) -> None:
        """From `grad` at `node` to the input; nodes are freed as they are done.

        A list of one, which is emptied: a caller's argument would keep the gradient alive.
        """
        waiting = {node: grad.pop()}
        while self.nodes:
            node = self.nodes.pop()
            if node not in waiting:
                continue
            grads = node.backward(waiting[node])
            del waiting[node]
            node.saved.clear()
            for i, target in enumerate(node.inputs):
                # A second gradient is added to the first in place.
                if target is not None and target not in waiting:
                    waiting[target] = grads[i]
            del grads
