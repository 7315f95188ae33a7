"""The matrix products of a step alone: which they are, and how long they take by themselves.

A step of fastppo is run once more and its products are counted: PyTorch's, and those of the output
head within `linear_token_logprobs` and `linear_policy_loss`. Then each is run by itself, between
matrices of the same shapes, into memory that is there. Attention, norms, activations and losses are
not among them: what they take is what is missing from 100%.

A step of decoding has few rows, so it is bounded by reading the weights, not by arithmetic.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo.ppo import score, update

Shape = tuple[int, int, int]  # rows, inputs, outputs
ROUNDS = 5
LEAST_ROWS = 9  # fewer are a step of decoding
aten = torch.ops.aten
FACTORS = {aten.mm: 0, aten.addmm: 1, aten.addmm_: 1}  # the place of the first of two matrices


class Products(TorchDispatchMode):
    """How often each product ran, by phase, while this is active."""

    def __init__(self, phase: Callable[[], str]) -> None:
        super().__init__()
        self.phase = phase
        self.counts: defaultdict[str, Counter[Shape]] = defaultdict(Counter)
        self._in_head = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        first = FACTORS.get(func.overloadpacket)
        if first is not None and not self._in_head:
            (rows, inner), columns = args[first].shape, args[first + 1].shape[1]
            if rows >= LEAST_ROWS:
                self.counts[self.phase()][rows, inner, columns] += 1
        return func(*args, **(kwargs or {}))

    def _head(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """An operator from hidden states: a frozen head's products are inside the kernel."""

        def counted(hidden_ND: Tensor, weight_VD: Tensor, *args: Any, **kwargs: Any) -> Any:
            (rows, width), words = hidden_ND.shape, weight_VD.shape[0]
            now = self.counts[self.phase()]
            now[rows, width, words] += 1
            if hidden_ND.requires_grad and torch.is_grad_enabled():
                now[rows, words, width] += 1
            self._in_head = True
            try:
                return original(hidden_ND, weight_VD, *args, **kwargs)
            finally:
                self._in_head = False

        return counted

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what runs inside the block."""
        heads = ((score, "linear_token_logprobs"), (update, "linear_policy_loss"))
        originals = [getattr(owner, name) for owner, name in heads]
        for (owner, name), original in zip(heads, originals, strict=True):
            setattr(owner, name, self._head(original))
        try:
            with self:
                yield
        finally:
            for (owner, name), original in zip(heads, originals, strict=True):
                setattr(owner, name, original)

    def seconds(self) -> dict[str, float]:
        """How long the products of each phase take by themselves; and GFLOP/s over all of them."""
        each = {shape: alone(shape) for shape in {s for c in self.counts.values() for s in c}}
        found = {
            phase: sum(count * each[shape] for shape, count in counts.items())
            for phase, counts in self.counts.items()
        }
        flops = sum(
            2 * count * shape[0] * shape[1] * shape[2]
            for counts in self.counts.values()
            for shape, count in counts.items()
        )
        return {**found, "gflops": flops / sum(found.values()) / 1e9}


def alone(shape: Shape) -> float:
    """Seconds of one product: the median of rounds, each over several weights in turn."""
    rows, width, columns = shape
    x, out = torch.randn(rows, width), torch.empty(rows, columns)
    weights = torch.randn(max(1, min(16, 2**24 // (width * columns))), columns, width)
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        for weight in weights:
            torch.mm(x, weight.t(), out=out)
        times.append((time.perf_counter() - began) / len(weights))
    return statistics.median(times[1:])


def bytes_per_second() -> float:
    """How fast all threads read memory: the sum of a matrix that is larger than a model."""
    x = torch.ones(2**28)  # 1 GiB
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - began)
    return x.nbytes / statistics.median(times)


def decoding_bytes(model: nn.Module, head_VD: Tensor) -> int:
    """What a step of decoding reads: the weights of every linear layer, and the head's."""
    layers = {m.weight for m in model.modules() if type(m) is nn.Linear} - {head_VD}
    frozen = [weight for weight in layers if not weight.requires_grad]
    return sum(weight.nbytes for weight in frozen) + head_VD.nbytes
