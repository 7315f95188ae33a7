"""Simulate a forward and backward pass on sizes, without tensors, to count bytes.

The pass runs op by op, as eager PyTorch does. Each result is a `Size`, which Python frees when it
would free the tensor; each autograd node keeps the sizes that PyTorch saves for its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

FLOAT32 = 4


class Ledger:
    """Counts the bytes that are allocated, now and at the peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def size(self, count: int) -> Size:
        """Allocate `count` bytes."""
        return Size(self, count)


class Size:
    """An allocation; it is freed when its last reference is gone."""

    __slots__ = ("bytes", "ledger")

    def __init__(self, ledger: Ledger, count: int) -> None:
        self.ledger, self.bytes = ledger, count
        ledger.now += count
        ledger.peak = max(ledger.peak, ledger.now)

    def __del__(self) -> None:
        self.ledger.now -= self.bytes


@dataclass(eq=False)
class Node:
    """An autograd node: the sizes that it saved, and a backward that allocates its gradients."""

    inputs: list[Node | None]
    backward: Callable[[Size], list[Size]]
    saved: list[Size] = field(default_factory=list)


@dataclass
class Value:
    """Represents a tensor (tokens, width) with `item` bytes per element; views share a `size`."""

    size: Size
    width: int
    item: int
    node: Node | None = None


class Tape:
    """Runs a simulated forward over a number of tokens, and its backward."""

    def __init__(self, tokens: int, *, grad: bool) -> None:
        self.tokens, self.grad = tokens, grad
        self.ledger = Ledger()
        self.nodes: list[Node] = []

    def new(self, width: int, item: int) -> Size:
        """Allocate a (tokens, width) tensor."""
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
        """Allocate an op's result; it has a node if an input or weight requires a gradient."""
        out = Value(self.new(width, item), width, item)
        if self.grad and (trains or any(value.node for value in inputs)):
            kept = [value.size for value in saved or []]
            out.node = Node([value.node for value in inputs], backward, kept)
            self.nodes.append(out.node)
        return out

    def gives(self, *gradients: tuple[int, int]) -> Callable[[Size], list[Size]]:
        """A backward that only allocates one gradient for each (width, item)."""
        return lambda _: [self.new(width, item) for width, item in gradients]

    def cast(self, x: Value, item: int) -> Value:
        """`x.to(dtype)`."""
        if x.item == item:
            return x
        return self.op(x.width, item, [x], self.gives((x.width, x.item)))

    def scaled(self, x: Value) -> Value:
        """x times an existing tensor that requires no gradient."""
        return self.op(x.width, x.item, [x], self.gives((x.width, x.item)))

    def add(self, x: Value, y: Value) -> Value:
        """x + y; both have the same gradient."""
        return self.op(x.width, x.item, [x, y], lambda grad: [grad, grad])

    def times(self, x: Value, y: Value) -> Value:
        """x * y; the backward needs both."""
        size = (x.width, x.item)
        return self.op(*size, [x, y], self.gives(size, size), [x, y])

    def backward(self, node: Node, grad: list[Size]) -> None:
        """Run the backward from `node` to the input; each node is freed when it is done.

        `grad` is a list with one gradient, which is removed from it: as a plain argument, the
        gradient would stay alive through the caller's reference.
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
