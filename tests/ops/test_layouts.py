"""Where an argument lies in memory changes no number: every tensor argument of every op.

Looped over the registry and over each op's signature, so that a new op or argument cannot forget
it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo.ops import HeadLora, PolicyLossConfig, moments, pack
from tests.ops.oracle import place, run, tensors
from tests.ops.registry import OPS, Op, Shape
from tests.tiers import interpreted, slow_unless

pytestmark = pytest.mark.usefixtures("poisoned")

Inputs = dict[str, Any]
SHAPE = Shape(n=4, vocab=37, hidden=5, batch=3)
SIZES = {"N": SHAPE.n, "V": SHAPE.vocab, "D": SHAPE.hidden, "B": SHAPE.batch, "R": 2}
# Public, and in no registry: its results are three numbers.
MOMENTS = dataclasses.replace(OPS["whiten"], name="moments", function=moments)
APART = ("kl_weight_N", "entropy_weight_N")


def drawn(letters: str, seed: int) -> Tensor:
    """Positive floats in the shape that a name's letters say, `_VD` and the like."""
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + torch.rand([SIZES[x] for x in letters], generator=generator)


def optional(name: str, kind: str, seed: int) -> Any:
    """A value for an argument that may be left out, by its name and its type's."""
    if kind.startswith("HeadLora"):
        return HeadLora(drawn("RD", seed), drawn("VR", seed + 1), 0.5)
    if kind.startswith("Moments"):
        return moments(drawn("N", seed), backend="torch")
    if name == "mask":  # every second token of an odd number is dead
        return torch.arange(SHAPE.n) % 2 == 0
    if name == "temperature":
        return drawn("N", seed)
    if name == "offsets":
        return torch.tensor([0, 1, 1, SHAPE.n], dtype=torch.int32)
    letters = name.rsplit("_", 1)[-1]
    if letters.isupper():
        assert set(letters) <= set(SIZES), f"no size is given here for the letters of {name}"
        return drawn(letters, seed)
    assert "float" in kind, f"no value is given here for {name}: {kind}"
    return torch.tensor(0.5)


def cases(op: Op) -> Iterator[Inputs]:
    """The op's inputs with every optional tensor given too; then as they are made.

    An optional tensor may take another's place, as an exact KL does that of two log-probs.
    """
    plain = op.make_inputs(SHAPE, torch.float32, 0)
    full = dict(plain)
    for seed, (name, parameter) in enumerate(inspect.signature(op.function).parameters.items()):
        kind = str(parameter.annotation)
        if "Tensor" not in kind and not kind.startswith(("HeadLora", "Moments")):
            continue
        if not isinstance(full.get(name), Tensor):
            full[name] = optional(name, kind, seed)
    # With weights apart the fused kernel is not called: they come with the last case.
    yield {name: x for name, x in full.items() if name not in APART}
    yield plain
    if "config" in inspect.signature(op.function).parameters:
        yield {**full, "config": PolicyLossConfig(ratio_level="sequence")}


def around(x: Tensor, *shape: int) -> Tensor:
    """Memory for a view of `x`, full of what must not be read; 0 is a token and an offset too."""
    filler = float("nan") if x.is_floating_point() else 0
    return torch.full(shape, filler, dtype=x.dtype, device=x.device)


def apart(x: Tensor) -> Tensor:
    """Every second entry, of every dimension: a column of (N, 2) has that stride."""
    wide = around(x, *(2 * size for size in x.shape))
    return wide[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)


def shifted(x: Tensor) -> Tensor:
    """Not at the start of its memory, nor at an address that 16 divides; rows with gaps."""
    wide = around(x, *(size + 3 for size in x.shape)) if x.ndim else around(x, 3)
    at = tuple(slice(1, size + 1) for size in x.shape) if x.ndim else (1,)
    return wide[at].copy_(x)


def expanded(x: Tensor) -> Tensor:
    """One entry for all along the first dimension: a stride of 0."""
    return shifted(x[:1]).expand(x.shape)


def expanded_across(x: Tensor) -> Tensor:
    return shifted(x[:, :1]).expand(x.shape)


def transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T


# By how many dimensions a tensor has at least.
LAYOUTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "apart": (1, apart),
    "shifted": (0, shifted),
    "expanded": (1, expanded),
    "expanded across": (2, expanded_across),
    "transposed": (2, transposed),
}


def parts(value: Any) -> dict[str, Tensor]:
    """The tensors of an argument: itself, or an adapter's or a tuple's fields by name."""
    if isinstance(value, Tensor):
        return {"": value}
    if isinstance(value, HeadLora):
        return {"A_RD": value.A_RD, "B_VR": value.B_VR}
    return value._asdict() if hasattr(value, "_asdict") else {}


def with_part(value: Any, part: str, x: Tensor) -> Any:
    if not part:
        return x
    if isinstance(value, HeadLora):
        return dataclasses.replace(value, **{part: x})
    return value._replace(**{part: x})


def on_device(inputs: Inputs, backend: str) -> Inputs:
    """The inputs where the backend wants them, the tensors within arguments too."""
    inputs = place(inputs, backend)
    device = next(x.device for x in inputs.values() if isinstance(x, Tensor))
    for name, value in inputs.items():
        for part, x in parts(value).items():
            inputs[name] = with_part(inputs[name], part, x.to(device))
    return inputs


def assert_same(got: list[Tensor], want: list[Tensor], name: str, backend: str = "") -> None:
    """To the bit; but a library's GEMM may take another way for operands that lie otherwise.

    And Triton's kernels, which load 16 bytes at once, add up a row in an order that its address
    decides: of a sum of 37 exponentials the last bits may differ.
    """
    rounded = name.endswith(("_ND", "_VD", "_RD", "_VR"))
    for a, b in zip(got, want, strict=True):
        if backend == "triton" and name.endswith("logits_NV"):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=2e-6, msg=f"{name}: {a} for {b}")
        elif rounded:
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5, msg=f"{name}: {a} for {b}")
        else:
            assert torch.equal(a, b), f"{name}: {a} for {b}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "op",
    [op for op in [*OPS.values(), MOMENTS] if not op.name.startswith("linear")],
    ids=lambda op: op.name,
)
@interpreted(lambda layout: layout == "shifted")
def test_where_an_argument_lies_changes_no_number(op, layout, backend):
    holds(op, layout, backend)


@pytest.mark.parametrize("layout", slow_unless(lambda layout: layout == "shifted", LAYOUTS))
@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.name.startswith("linear")], ids=lambda op: op.name
)
def test_where_an_argument_of_a_head_lies_changes_no_number(op, layout, traced):
    """Its rows are copied, whatever a backend makes of logits: the fast tier has one backend."""
    holds(op, layout, traced)


def holds(op: Op, layout: str, backend: str) -> None:
    """Each argument of the operator moved in its turn, by the layout."""
    least, change = LAYOUTS[layout]
    if op.name.startswith("linear") and op.differentiable:
        op = dataclasses.replace(op, differentiable=(*op.differentiable, "weight_VD"))
    tested = set()
    # Triton's interpreter is slow: other layouts than these have the first case alone.
    for inputs in islice(cases(op), None if layout in ("apart", "shifted") else 1):
        inputs = on_device(inputs, backend)

        def results(inputs: Inputs, name: str = "", part: str = "", x: Any = None) -> list[Tensor]:
            given = {**inputs, name: with_part(inputs[name], part, x)} if name else inputs
            values, grads = run(op, op.function, given, backend=backend)
            return [*values, *grads]

        side_by_side = results(inputs)
        for name, value in inputs.items():
            for part, x in parts(value).items():
                if x.ndim < least or (name == "offsets" and layout == "expanded"):
                    continue  # offsets ascend
                moved = change(x)
                want = side_by_side
                if "expanded" in layout:  # other numbers
                    want = results(inputs, name, part, moved.contiguous())
                assert_same(results(inputs, name, part, moved), want, part or name, backend)
                tested.add(name)
    taken = inspect.signature(op.function).parameters.values()
    missed = {p.name for p in taken if "Tensor" in str(p.annotation)} - tested
    assert least or not missed, "every argument has a layout of any number of dimensions"


@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.differentiable and not op.loss], ids=lambda op: op.name
)
@pytest.mark.parametrize("layout", ["apart", "shifted", "expanded"])
@interpreted(lambda layout: layout == "shifted")
def test_where_the_gradient_from_above_lies_changes_no_number(op, layout, backend):
    inputs = on_device(op.make_inputs(SHAPE, torch.float32, 1), backend)
    (leaf,) = op.differentiable
    above = LAYOUTS[layout][1](torch.linspace(1, 2, SHAPE.n, device=inputs[leaf].device))
    found = []
    for gradient in (above, above.clone(memory_format=torch.contiguous_format)):
        own = inputs[leaf].clone().requires_grad_()
        results = tensors(op.function(**{**inputs, leaf: own}, backend=backend))
        results = [x for x in results if x.requires_grad]
        found.append(torch.autograd.grad(results, own, [gradient] * len(results)))
    assert_same(list(found[0]), list(found[1]), "grad_output")


@pytest.mark.parametrize("mask", [apart, transposed, expanded], ids=lambda f: f.__name__)
def test_where_a_mask_lies_changes_no_packing(mask):
    mask_BT = mask(torch.arange(20).view(4, 5) % 3 != 0)
    got, want = pack(mask_BT), pack(mask_BT.contiguous())
    assert torch.equal(got.index_N, want.index_N)
    assert torch.equal(got.offsets, want.offsets)


def test_a_column_of_advantages_by_hand(backend):
    """Every token has ratio 1, so the loss is the mean of -A: of 1 to 4, -2.5."""
    op = OPS["policy_loss"]
    inputs = place(op.make_inputs(SHAPE, torch.float32, 2), backend)
    inputs |= {"kl_coef": 0.0, "entropy_coef": 0.0, "ref_logprob_N": None}
    with torch.no_grad():
        inputs["behaviour_logprob_N"] = op.function(**inputs, backend=backend).logprob_N
        pairs_N2 = torch.tensor([[i + 1.0, 100.0] for i in range(SHAPE.n)])
        pairs_N2 = pairs_N2.to(inputs["logits_NV"].device)
        inputs["advantage_N"] = pairs_N2[:, 0]
        loss = op.function(**inputs, backend=backend).loss
    assert loss.item() == pytest.approx(-2.5, abs=1e-5)


# What a caller may cut out of a (2 N, 2 V) tensor, N x V each.
VIEWS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "columns": lambda wide, n, vocab: wide[:n, 1 : vocab + 1],
    "every second row": lambda wide, n, vocab: wide[::2, :vocab],
    "every second entry": lambda wide, n, vocab: wide[1::2, ::2],
    "transposed": lambda wide, n, vocab: wide.view(2 * vocab, -1)[:vocab, :n].T,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("vocab", [37, 4113])
@pytest.mark.parametrize("factor", [1.0, 3.0])
@interpreted(lambda vocab, factor: vocab == 4113 and factor != 1)
def test_in_place_writes_the_view_and_nothing_beside_it(view, vocab, factor, backend):
    """Also where the loss is scaled after, as accumulation and loss scalers do."""
    op, n = OPS["policy_loss"], 3
    inputs = on_device(op.make_inputs(Shape(n=n, vocab=vocab), torch.float32, 3), backend)
    logits_NV = inputs.pop("logits_NV")
    leaf = logits_NV.clone().requires_grad_()
    (factor * op.function(leaf, **inputs, backend=backend).loss).backward()

    wide = torch.linspace(1, 2, 4 * n * vocab, device=logits_NV.device).view(2 * n, 2 * vocab)
    VIEWS[view](wide, n, vocab).copy_(logits_NV)
    whole = wide.clone().requires_grad_()
    memory = whole * 1.0
    result = op.function(VIEWS[view](memory, n, vocab), **inputs, inplace=True, backend=backend)
    (factor * result.loss).backward()

    assert_same([VIEWS[view](whole.grad, n, vocab)], [leaf.grad], "logits_NV", backend)
    outside = torch.ones_like(wide, dtype=torch.bool)
    VIEWS[view](outside, n, vocab).fill_(False)
    assert torch.equal(memory.detach()[outside], wide[outside])
    assert not whole.grad[outside].any()
