"""The rule by which an op's numbers are judged, for all backends and edges.

The yardstick is the definition on the same inputs upcast to float32, both against float64: an
error of at most twice the yardstick's, and a floor of 4 eps max|z| for statistics and one unit in
the last place for gradients; as maximum and as relative L2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.ops.registry import Op

EPS = torch.finfo(torch.float32).eps


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def few(rows: int, backend: str, interpreted: int) -> int:
    """So many rows; fewer for Triton's interpreter, which takes milliseconds for each.

    A program goes over one row and knows of no other, and a GPU is given all of them.
    """
    return min(rows, interpreted) if backend == "triton" and device_of(backend) == "cpu" else rows


def place(inputs: dict[str, Any], backend: str) -> dict[str, Any]:
    """The inputs where the backend wants them."""
    device = device_of(backend)
    return {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.items()}


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result; metrics, which the definitions do not give, are left out."""
    if isinstance(result, Tensor):
        return [result]
    return [x for x in result if isinstance(x, Tensor)]


def scalar(op: Op, result: Any, *, even: bool = False) -> Tensor:
    """Something to call backward on: the op's loss, or all results with weights of their own.

    `even` gives them all the weight 1: no result then depends on its place.
    """
    if op.loss:
        return getattr(result, op.loss)
    parts = [x for x in tensors(result) if x.requires_grad]
    weights = [
        torch.linspace(1, 1 if even else 2, x.numel(), dtype=x.dtype).view_as(x) for x in parts
    ]
    # A masked sample's log-prob is -inf, and -inf less inf is no sum to call backward on.
    finite = [x.masked_fill(x.isinf(), 0) for x in parts]
    pairs = zip(finite, weights, strict=True)
    return torch.stack([(x * w.to(x.device)).sum() for x, w in pairs]).sum()


def run(
    op: Op, function: Any, inputs: dict[str, Any], *, even: bool = False, **keywords: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients, both detached and on the CPU."""
    inputs = dict(inputs)
    for name in op.differentiable:
        # detach, not clone: the strides are part of what is tested.
        inputs[name] = inputs[name].detach().requires_grad_()
    result = function(**inputs, **keywords)
    if op.differentiable:
        scalar(op, result, even=even).backward()
    grads = [inputs[name].grad.cpu() for name in op.differentiable]
    return [x.detach().cpu() for x in tensors(result)], grads


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def largest(inputs: dict[str, Any]) -> float:
    """Max |z| of the logits that an op is given or makes; of its inputs where it has none."""
    if "weight_VD" in inputs:
        names = [name for name in ("hidden_ND", "ref_hidden_ND") if name in inputs]
        found = [inputs[name].double() @ inputs["weight_VD"].double().T for name in names]
    else:
        logits = [x for name, x in inputs.items() if name.endswith("logits_NV")]
        floats = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
        found = logits or floats
    # Masks and poison are no logits.
    sane = [torch.where(x.abs() < 1e9, x, 0).abs() for x in found if x.numel()]
    tau = inputs.get("temperature", 1.0)
    return max((x.max().item() for x in sane), default=0.0) / float(torch.as_tensor(tau).min())


def same_where_not_finite(got: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Both with their infinities and NaN, which must be in the same places, taken out."""
    odd = ~truth.isfinite()
    assert torch.equal(got[odd], truth[odd].to(got.dtype)) or bool(truth[odd].isnan().all())
    return got.double().masked_fill(odd, 0), truth.masked_fill(odd, 0)


def check(op: Op, inputs: dict[str, Any], backend: str, slack: float = 1.0) -> None:
    """The op on `backend` obeys the rule on these inputs; `slack` is for fuzz.py's bad luck."""
    exact, exact_grads = run(op, op.reference, cast(inputs, torch.float64))
    plain, plain_grads = run(op, op.reference, cast(inputs, torch.float32))
    # The yardstick's GEMM gives float32 logits, as the op's does by default.
    got, got_grads = run(op, op.function, place(inputs, backend), backend=backend)
    floor = 4 * EPS * largest(inputs)
    for a, b, truth in zip(got, plain, exact, strict=True):
        assert a.dtype == torch.float32
        if not truth.numel():
            continue
        mine, right = same_where_not_finite(a, truth)
        yardstick = b.double().masked_fill(~truth.isfinite(), 0)
        bound = 2 * (yardstick - right).abs().max() + floor
        assert (mine - right).abs().max() <= slack * bound
    for name, a, b, truth in zip(
        op.differentiable, got_grads, plain_grads, exact_grads, strict=True
    ):
        dtype = inputs[name].dtype
        assert a.dtype == dtype
        if not truth.numel():
            continue
        eps = torch.finfo(dtype).eps
        ulp = eps * truth.abs().max()
        rounded = b.to(dtype).double()
        bound = 2 * (rounded - truth).abs().max() + ulp
        assert (a.double() - truth).abs().max() <= slack * bound
        # The largest entry hides the small ones; the norm does not.
        gap, yardstick_norm = (a.double() - truth).norm(), (rounded - truth).norm()
        assert gap <= slack * (2 * yardstick_norm + eps * truth.norm())
