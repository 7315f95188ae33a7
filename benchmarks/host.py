"""What a call costs the host: every operator on 4 tokens of 64 words, where little is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import answer, leaves, make_inputs, right_answer
from benchmarks.harness import TOLERANCE, Case, Contender
from tests.ops.registry import OPS, Op, Shape

SHAPE = Shape(n=4, vocab=64, hidden=8, batch=2)
MEASURE = "F.cross_entropy, with backward"
FLOOR = "a function that does nothing, with backward"


class Nothing(torch.autograd.Function):
    """The least that an operator with a gradient of its own costs: one tensor saved and given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x


def cases() -> Iterator[Case]:
    """Each operator among the same three bounds; on one thread, whose barriers cost nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for op in OPS.values():
            yield make_case(op)
    finally:
        torch.set_num_threads(before)


def make_case(op: Op) -> Case:
    """Forward, and with backward where there is one, of the public function as it is called."""
    inputs = make_inputs(op, SHAPE, torch.float32)
    case = Case(
        fields={"op": op.name, "shape": "N 4, V 64", "dtype": "float32"},
        want=right_answer(op, inputs),
        tolerance=TOLERANCE[torch.float32],
    )
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SHAPE.n, SHAPE.vocab, generator=generator)
    token = torch.randint(SHAPE.vocab, (SHAPE.n,), generator=generator)
    leaf = logits.clone().requires_grad_()

    def fresh(x: Tensor, call: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            x.grad = None
            call().backward()

        return step

    case.add(Contender("F.cross_entropy", lambda: F.cross_entropy(logits, token)))
    case.add(Contender(MEASURE, fresh(leaf, lambda: F.cross_entropy(leaf, token))))
    case.add(Contender(FLOOR, fresh(leaf, lambda: Nothing.apply(leaf))))
    check = lambda: answer(op, op.function, leaves(op, inputs))  # noqa: E731
    forward = lambda: op.function(**inputs)  # noqa: E731
    case.add(Contender("fastppo, forward", forward, check, MEASURE, ours=True))
    if op.differentiable:
        own = leaves(op, inputs)
        (name,) = op.differentiable

        def scalar() -> Tensor:
            found = op.function(**own)
            if op.loss:
                return getattr(found, op.loss)
            return (found if isinstance(found, Tensor) else found[0]).sum()

        step = fresh(own[name], scalar)
        case.add(Contender("fastppo, with backward", step, check, MEASURE, ours=True))
    return case


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """Each operator's cost in units of `F.cross_entropy` with backward, of the same case."""
    notes = []
    for op in OPS:
        mine = {row["what"]: row["ms"] for row in rows if row["op"] == op and "ms" in row}
        if MEASURE not in mine:
            continue
        ours = [x for x in ("fastppo, forward", "fastppo, with backward") if x in mine]
        said = ", ".join(
            f"{x.removeprefix('fastppo, ')} {mine[x] / mine[MEASURE]:.2f}" for x in ours
        )
        floor = mine[FLOOR] / mine[MEASURE]
        notes.append(f"{op}, in units of {MEASURE}: {said}; {FLOOR}: {floor:.2f}")
    return notes
