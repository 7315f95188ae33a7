"""What holds of every op, looped over the registry: a new op cannot forget its tests."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import fastppo.ops
import fastppo.ops.registry
from tests.ops.oracle import cast, run, tensors
from tests.ops.registry import OPS, Shape

SHAPES = [
    Shape(n=1, vocab=1, hidden=1, batch=1),
    Shape(n=5, vocab=1, hidden=3, batch=2),
    Shape(n=1, vocab=37, hidden=11, batch=1),
    Shape(n=13, vocab=37, hidden=11, batch=4),
    Shape(n=64, vocab=1031, hidden=48, batch=7),
]
LARGE = SHAPES[-1]
ALL = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)


def test_every_public_op_is_registered():
    # No array of results to compare, or several processes; they have tests of their own.
    others = {"gather_weight", "moments", "pack"}
    for op in OPS.values():
        assert "backend" in inspect.signature(op.function).parameters
    public = {name for name in fastppo.ops.__all__ if name[0].islower()}
    others.add("losses")  # a module of plain PyTorch
    assert public - others == set(OPS)
    assert set(fastppo.ops.registry.OPS) == set(OPS)


@ALL
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_definitions_in_float64(op, shape):
    inputs = op.make_inputs(shape, torch.float64, 0)
    inputs = cast(inputs, torch.float64)
    got, got_grads = run(op, op.function, inputs)
    want, want_grads = run(op, op.reference, inputs)
    for a, b in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@ALL
def test_the_same_inputs_give_the_same_bits_and_rows_do_so_for_any_number_of_threads(op):
    inputs = op.make_inputs(LARGE, torch.float32, 2)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 1, 2):
            torch.set_num_threads(count)
            values, grads = run(op, op.function, inputs)
            runs.append([*values, *grads])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs[:2], strict=True))
    # A head's GEMM is its library's: oneMKL adds up in another order on another number of threads.
    rounding = 1e-5 if op.name.startswith("linear_") else 0.0
    for one, two in zip(runs[0], runs[2], strict=True):
        torch.testing.assert_close(one, two, atol=rounding, rtol=rounding, equal_nan=True)


@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.differentiable], ids=lambda o: o.name
)
def test_gradcheck_of_op_and_definition_in_float64(op):
    inputs = cast(
        op.make_inputs(Shape(n=4, vocab=7, hidden=3, batch=2), torch.float64, 4), torch.float64
    )
    names = op.differentiable

    def call(function: Any) -> Any:
        def of(*args: Tensor) -> Any:
            result = function(**{**inputs, **dict(zip(names, args, strict=True))})
            return getattr(result, op.loss) if op.loss else tuple(tensors(result))

        return of

    args = tuple(inputs[name].clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(call(op.reference), args)
    assert torch.autograd.gradcheck(call(op.function), args)


@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.differentiable], ids=lambda o: o.name
)
def test_no_result_needs_a_gradient_under_no_grad(op):
    inputs = op.make_inputs(SHAPES[3], torch.float32, 5)
    for name in op.differentiable:
        inputs[name] = inputs[name].requires_grad_()
    with torch.no_grad():
        assert not any(x.requires_grad for x in tensors(op.function(**inputs)))


@pytest.mark.parametrize("needs", ["under no_grad", "of frozen inputs"])
@pytest.mark.parametrize("name", ["policy_loss", "linear_policy_loss"])
def test_no_gradient_is_made_in_the_forward_where_none_is_wanted(name, needs):
    op = OPS[name]
    inputs = op.make_inputs(SHAPES[3], torch.float32, 5)
    (leaf,) = op.differentiable
    makes = {}
    for wanted in (True, False):
        inputs[leaf].requires_grad_(wanted or needs == "under no_grad")
        with (
            torch.profiler.profile() as profile,
            torch.set_grad_enabled(wanted or needs != "under no_grad"),
        ):
            op.function(**inputs, backend="torch")
        # The sampled token's entry of the gradient: one a block of rows.
        makes[wanted] = sum(event.name == "aten::scatter_add_" for event in profile.events())
    assert makes == {True: 1, False: 0}


@ALL
def test_inputs_are_left_as_they_were(op):
    inputs = op.make_inputs(SHAPES[3], torch.float64, 6)
    before = {k: x.clone() if isinstance(x, Tensor) else x for k, x in inputs.items()}
    op.function(**inputs)
    for name, x in inputs.items():
        assert torch.equal(x, before[name]) if isinstance(x, Tensor) else x == before[name]


@ALL
def test_a_backend_that_is_none_or_cannot_run_is_refused(op):
    inputs = op.make_inputs(SHAPES[3], torch.float32, 7)
    with pytest.raises(ValueError, match=rf"^{op.name}: backend='nonsense' is no backend; wanted"):
        op.function(**inputs, backend="nonsense")
    wide = cast(inputs, torch.float64)
    for name in ("triton", "native"):
        refusal = rf"^{op.name}: backend='{name}' cannot run: .*float64"
        with pytest.raises(ValueError, match=refusal):
            op.function(**wide, backend=name)
    op.function(**inputs, backend="torch")


@ALL
def test_bytes_and_flops_are_stated(op):
    assert op.bytes_moved(SHAPES[3], torch.float32) > 0
    assert op.flops(SHAPES[3]) > 0
