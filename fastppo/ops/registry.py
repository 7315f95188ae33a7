"""The list of all ops, which tests and benchmarks loop over: an op cannot forget its tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch


@dataclass(frozen=True)
class Shape:
    """The size of an op's inputs: n tokens in `batch` sequences, a vocabulary, a hidden size."""

    n: int
    vocab: int = 1
    hidden: int = 1
    batch: int = 1


@dataclass(frozen=True)
class Op:
    """One public op, with what a test or a benchmark must know of it.

    Args:
        name: its public name, and the stem of its module, test and kernel.
        function: the op.
        reference: the definition, plain PyTorch for autograd; same arguments (keywords that only
            steer memory or backend excepted), same results.
        make_inputs: (shape, dtype, seed) -> keyword arguments for both, on the CPU.
        bytes_moved: (shape, dtype) -> bytes that forward and backward must at least move.
        flops: (shape) -> floating-point operations that forward and backward must at least do.
        differentiable: arguments through which a gradient flows.
        loss: name of the scalar result to call backward on; None sums over the differentiable
            results.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[[Shape, torch.dtype, int], dict[str, Any]]
    bytes_moved: Callable[[Shape, torch.dtype], int]
    flops: Callable[[Shape], int]
    differentiable: tuple[str, ...] = field(default=())
    loss: str | None = None


OPS: Final[dict[str, Op]] = {}


def register(op: Op) -> None:
    """Adds an op to `OPS`; called once, at the end of the op's module."""
    assert op.name not in OPS, f"two ops are called {op.name}"
    OPS[op.name] = op


def even_offsets(shape: Shape) -> torch.Tensor:
    """Offsets that cut shape.n tokens into shape.batch sequences of nearly one length."""
    return (torch.arange(shape.batch + 1) * shape.n // max(shape.batch, 1)).int()
