"""The ops as torch.library sees them: schemas, fakes, autograd; and under torch.compile."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo.ops import PolicyLossConfig, policy_loss, token_logprobs
from fastppo.ops.backend import available
from tests.ops.oracle import few, place, run, scalar
from tests.ops.registry import OPS, Op, Shape
from tests.tiers import interpreted, slow_unless

SHAPE = Shape(n=6, vocab=19, hidden=5, batch=2)
LOSSES = pytest.mark.parametrize("name", ["policy_loss", "linear_policy_loss"])
ALL = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
# Over tokens and over rows, with a gradient and without, from logits and from hidden states.
COMPILED = ("whiten", "token_kl", "score_tokens", "policy_loss", "linear_token_logprobs")


class Tracer(TorchDispatchMode):
    """Looks on, as a tracer does, and changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def recorded(op: Op, inputs: dict[str, Any], backend: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """The registered operators that a call goes through, with what they were given."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if getattr(func, "namespace", "") == "fastppo" or "fastppo" in str(func):
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Tracer(), Recorder():
        op.function(**inputs, backend=backend)
    return calls


@ALL
def test_opcheck(op, traced):
    inputs = place(op.make_inputs(SHAPE, torch.float32, 0), traced)
    for name in op.differentiable:
        inputs[name] = inputs[name].requires_grad_()
    calls = recorded(op, inputs, traced)
    assert [str(call).split(".")[1] for call, _ in calls] == [op.name]
    for call, args in calls:
        torch.library.opcheck(call, args)


@LOSSES
def test_opcheck_of_a_negative_loss(name, traced):
    """Its backward multiplies by the sign, and not in place: an output belongs to the caller."""
    op = OPS[name]
    inputs = place(op.make_inputs(SHAPE, torch.float32, 0), traced)
    inputs["advantage_N"] = inputs["advantage_N"].abs() + 1
    inputs[op.differentiable[0]].requires_grad_()
    assert op.function(**inputs, backend=traced).loss < 0
    ((call, args),) = recorded(op, inputs, traced)
    torch.library.opcheck(call, args)


@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_logprobs"])
def test_opcheck_of_backwards(name, traced):
    op = OPS[name]
    inputs = place(op.make_inputs(SHAPE, torch.float32, 0), traced)
    ((_, args),) = recorded(op, inputs, traced)
    forward = getattr(torch.ops.fastppo, name)
    stats = forward(*args)[:4]
    g_N = torch.ones_like(stats[0])
    *given, last = args
    wanted: tuple[list[bool], ...] = ()
    if name == "linear_token_logprobs":
        # Less entropy_grad, keep_logits and wanted.
        wanted, given = ([True] * 2 + [False] * 3,), given[:-3]
    backward = getattr(torch.ops.fastppo, f"{name}_backward").default
    torch.library.opcheck(backward, (g_N, None, *wanted, *given, *stats, last))


@ALL
@interpreted(lambda op: not op.name.startswith("linear"))
def test_eager_and_registered_calls_give_the_same_bits(op, backend):
    """Eager calls go around torch.library; forward and backward are the same all the same."""
    inputs = place(op.make_inputs(SHAPE, torch.float32, 2), backend)
    want = run(op, op.function, inputs, backend=backend)
    with Tracer():
        got = run(op, op.function, inputs, backend=backend)
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert torch.equal(a, b)


@ALL
def test_eager_calls_do_not_pay_for_torch_library(op, traced):
    inputs = place(op.make_inputs(SHAPE, torch.float32, 3), traced)
    activities = [torch.profiler.ProfilerActivity.CPU]
    names = {}
    for how in (nullcontext(), Tracer()):
        with torch.profiler.profile(activities=activities) as profile, how:
            run(op, op.function, inputs, backend=traced)
        names[type(how)] = {event.name for event in profile.events()}
    of_library = [{n for n in found if n.startswith("fastppo::")} for found in names.values()]
    assert not of_library[0]
    assert f"fastppo::{op.name}" in of_library[1]


@pytest.mark.parametrize(
    "op", slow_unless(lambda op: op.name in COMPILED, OPS.values()), ids=lambda op: op.name
)
def test_compiled_whole_it_gives_the_same_numbers(op, traced):
    inputs = place(op.make_inputs(SHAPE, torch.float32, 1), traced)
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    want = run(op, op.function, inputs, backend=traced)
    got = run(op, compiled, inputs, backend=traced)
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def scaled_step(op: Op, backend: str, factor: float) -> Any:
    """A step whose backward multiplies the gradient of the loss by `factor`."""

    def step(**inputs: Any) -> Tensor:
        return factor * op.function(**inputs, backend=backend).loss

    return step


@pytest.mark.parametrize("name", ["policy_loss", "linear_policy_loss", "token_logprobs"])
@interpreted(lambda name: name == "policy_loss")
def test_traced_there_is_no_pass_over_the_logits_besides_the_operators_own(name, fused):
    """In the graphs of forward and backward nothing else gives out as much as the gradient is."""
    from functorch.compile import make_boxed_func  # slow to import
    from torch._dynamo.backends.common import aot_autograd

    op = OPS[name]
    inputs = place(op.make_inputs(SHAPE, torch.float32, 1), fused)
    inputs[op.differentiable[0]].requires_grad_()
    size, graphs, others = inputs[op.differentiable[0]].numel(), [], []

    def look(graph: Any, example: list[Tensor]) -> Any:
        graphs.append(graph)
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, Tensor) and value.numel() >= size:
                others.append(str(node.target))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        lambda **given: scalar(op, op.function(**given, backend=fused)),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=look, bw_compiler=look),
    )
    compiled(**inputs).backward()
    assert len(graphs) == 2
    assert others, "the gradient is made by an operator"
    assert all(other.startswith("fastppo.") for other in others), others


@pytest.mark.slow  # Inductor compiles
@pytest.mark.parametrize("name", ["policy_loss", "linear_policy_loss"])
def test_generated_code_has_no_memory_of_that_size(name):
    """The operators make theirs themselves; what torch.compile made was a copy."""
    from torch._inductor.utils import run_and_get_code  # slow to import

    *_, fused, _ = available()  # not by an interpreter, if there is another
    op = OPS[name]
    inputs = place(op.make_inputs(SHAPE, torch.float32, 1), fused)
    (leaf,) = op.differentiable
    want = inputs[leaf].clone().requires_grad_()
    scaled_step(op, fused, -3.0)(**{**inputs, leaf: want}).backward()
    inputs[leaf].requires_grad_()
    compiled = torch.compile(scaled_step(op, fused, -3.0), fullgraph=True)
    _, codes = run_and_get_code(lambda: compiled(**inputs).backward())
    shape = ", ".join(str(n) for n in inputs[leaf].shape)
    assert len(codes) == 2
    assert [code.count("= torch.ops.fastppo.scale_donated") for code in codes] == [0, 1]
    assert not any(f"empty_strided_cpu(({shape})" in code for code in codes)
    assert torch.equal(inputs[leaf].grad, want.grad)


@LOSSES
def test_a_second_traced_backward_is_an_error_as_an_eager_one_is(name, fused):
    op = OPS[name]
    inputs = place(op.make_inputs(SHAPE, torch.float32, 1), fused)
    inputs[op.differentiable[0]].requires_grad_()
    with Tracer():
        loss = op.function(**inputs, backend=fused).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@LOSSES
def test_hooks_that_copy_what_is_saved_are_refused(name, fused):
    """A gradient without elements is no gradient once it is copied: no other numbers come of it."""
    op = OPS[name]
    inputs = place(op.make_inputs(SHAPE, torch.float32, 1), fused)
    inputs[op.differentiable[0]].requires_grad_()
    copies = torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda x: x)
    with Tracer(), copies:
        loss = op.function(**inputs, backend=fused).loss
    with pytest.raises(RuntimeError, match="was not saved: hooks on saved tensors"):
        loss.backward()


@pytest.mark.parametrize("name", ["policy_loss", "token_logprobs"])
def test_50_changing_steps_recompile_once(name, traced):
    """N, beta, epsilon and temperature change as in training; the one is N's turning dynamic.

    Triton's interpreter takes 12 of the steps: all of N's values have come by then, several times.
    """
    torch._dynamo.reset()
    compilations = 0

    def count(graph: Any, example: list[Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    def step(
        logits: Tensor, token: Tensor, beta: Tensor, tau: Tensor, rest: dict[str, Tensor]
    ) -> Any:
        if name == "token_logprobs":
            return token_logprobs(logits, token, temperature=tau, backend=traced).logprob_N.sum()
        config = PolicyLossConfig(clip_low=0.2, clip_high=0.3)
        return policy_loss(
            logits, token, kl_coef=beta, temperature=tau, config=config, backend=traced, **rest
        ).loss

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for i in range(few(50, traced, 12)):
        shape = Shape(n=3 + i % few(7, traced, 2), vocab=19)
        inputs = place(OPS["policy_loss"].make_inputs(shape, torch.float32, i), traced)
        device = inputs["logits_NV"].device
        rest = {k: inputs[k] for k in inputs if k.endswith("_N") and k != "token_N"}
        beta, tau = (torch.tensor(x, device=device) for x in (0.1 + 0.01 * i, 1.0 + 0.01 * i))
        args = (inputs["logits_NV"], inputs["token_N"], beta, tau, rest)
        torch.testing.assert_close(compiled(*args), step(*args))
    assert compilations == 2
