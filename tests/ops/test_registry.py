"""What holds of every op, looped over the registry: a new op cannot forget its tests."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import fastppo.ops
from fastppo.ops.registry import OPS, Op, Shape

SHAPES = [
    Shape(n=1, vocab=1, hidden=1, batch=1),
    Shape(n=5, vocab=1, hidden=3, batch=2),
    Shape(n=1, vocab=37, hidden=11, batch=1),
    Shape(n=13, vocab=37, hidden=11, batch=4),
    Shape(n=64, vocab=1031, hidden=48, batch=7),
]
LARGE = SHAPES[-1]
ALL = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result; metrics, which the definitions do not give, are left out."""
    if isinstance(result, Tensor):
        return [result]
    return [x for x in result if isinstance(x, Tensor)]


def scalar(op: Op, result: Any) -> Tensor:
    """Something to call backward on: the op's loss, or all results with weights of their own."""
    if op.loss:
        return getattr(result, op.loss)
    parts = [x for x in tensors(result) if x.requires_grad]
    weights = [torch.linspace(1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in parts]
    return torch.stack([(x * w).sum() for x, w in zip(parts, weights, strict=True)]).sum()


def run(op: Op, function: Any, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients, both detached."""
    inputs = dict(inputs)
    for name in op.differentiable:
        inputs[name] = inputs[name].detach().clone().requires_grad_()
    result = function(**inputs)
    if op.differentiable:
        scalar(op, result).backward()
    grads = [inputs[name].grad for name in op.differentiable]
    return [x.detach() for x in tensors(result)], grads


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def test_every_public_op_is_registered():
    others = {"moments", "pack"}  # no array of results to compare; they have tests of their own
    public = {name for name in fastppo.ops.__all__ if name[0].islower()}
    assert public - others == set(OPS)


@ALL
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_definitions_in_float64(op, shape):
    inputs = op.make_inputs(shape, torch.float64, 0)
    inputs = cast(inputs, torch.float64)
    got, got_grads = run(op, op.function, inputs)
    want, want_grads = run(op, op.reference, inputs)
    for a, b in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def largest(op: Op, inputs: dict[str, Any]) -> float:
    """Max |z| of the logits that an op is given or makes; of its inputs where it has none."""
    if "weight_VD" in inputs:
        names = [name for name in ("hidden_ND", "ref_hidden_ND") if name in inputs]
        found = [inputs[name].double() @ inputs["weight_VD"].double().T for name in names]
    else:
        logits = [x for name, x in inputs.items() if name.endswith("logits_NV")]
        floats = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
        found = logits or floats
    return max(x.abs().max().item() for x in found)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_38_bf16_error_bound(op, dtype):
    """The yardstick: the definition on the same inputs, upcast to float32; both against float64."""
    inputs = op.make_inputs(LARGE, dtype, 1)
    exact, exact_grads = run(op, op.reference, cast(inputs, torch.float64))
    plain, plain_grads = run(op, op.reference, cast(inputs, torch.float32))
    # The yardstick's GEMM gives float32 logits, so the op is asked for the same.
    wide = {"logits_dtype": torch.float32} if op.name.startswith("linear") else {}
    got, got_grads = run(op, op.function, {**inputs, **wide})
    floor = 4 * torch.finfo(torch.float32).eps * largest(op, inputs)
    for a, b, truth in zip(got, plain, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - truth).abs().max() <= 2 * (b - truth).abs().max() + floor
    for a, b, truth in zip(got_grads, plain_grads, exact_grads, strict=True):
        assert a.dtype == dtype
        ulp = torch.finfo(dtype).eps * truth.abs().max()
        assert (a.double() - truth).abs().max() <= 2 * (b - truth).abs().max() + ulp
        # The largest entry hides the small ones; the norm does not.
        gap, yardstick = (a.double() - truth).norm(), (b - truth).norm()
        assert gap <= 2 * yardstick + torch.finfo(dtype).eps * truth.norm()


@ALL
def test_the_same_inputs_give_the_same_bits_for_any_number_of_threads(op):
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
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("name", ["token_logprobs", "policy_loss", "score_tokens", "token_kl"])
def test_a_tokens_result_does_not_depend_on_the_batch_around_it(name):
    """Nor does its gradient; GEMMs of one row and of many round differently, so not linear ops."""
    op = OPS[name]
    inputs = op.make_inputs(Shape(n=9, vocab=501, hidden=4, batch=1), torch.float32, 3)

    def of(rows: slice) -> list[Tensor]:
        part = {k: x[rows] if isinstance(x, Tensor) and x.ndim else x for k, x in inputs.items()}
        for leaf in op.differentiable:
            part[leaf] = part[leaf].clone().requires_grad_()
        result = op.function(**part)
        if op.differentiable:
            sums = [x.sum() for x in tensors(result) if x.requires_grad]
            torch.stack(sums).sum().backward()
        return [x.detach() for x in tensors(result) if x.ndim] + [
            part[leaf].grad for leaf in op.differentiable
        ]

    together = of(slice(None))
    for i in range(9):
        for whole, one in zip(together, of(slice(i, i + 1)), strict=True):
            assert torch.equal(whole[i : i + 1], one)


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
            return getattr(result, op.loss) if op.loss else result

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
            op.function(**inputs)
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


@pytest.mark.parametrize(
    "op",
    [op for op in OPS.values() if "backend" in inspect.signature(op.function).parameters],
    ids=lambda op: op.name,
)
def test_a_backend_that_is_none_or_cannot_run_is_refused(op):
    inputs = op.make_inputs(SHAPES[3], torch.float32, 7)
    with pytest.raises(ValueError, match=rf"^{op.name}: backend='nonsense' is no backend; wanted"):
        op.function(**inputs, backend="nonsense")
    with pytest.raises(ValueError, match=rf"^{op.name}: backend='triton' cannot run: .*no triton"):
        op.function(**inputs, backend="triton")
    op.function(**inputs, backend="torch")


@ALL
def test_nothing_is_done_to_no_tokens(op):
    inputs = op.make_inputs(Shape(n=0, vocab=5, hidden=3, batch=0), torch.float32, 0)
    values, grads = run(op, op.function, inputs)
    assert all(x.numel() == 0 or x.item() == 0 for x in values)
    assert all(x.shape[0] == 0 for x in grads)


@ALL
def test_bytes_and_flops_are_stated(op):
    assert op.bytes_moved(SHAPES[3], torch.float32) > 0
    assert op.flops(SHAPES[3]) > 0
