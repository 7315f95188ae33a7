"""Every operator of the registry where it matters: its backends, eager, torch.compile, a bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks import contenders as eager
from benchmarks import peers
from benchmarks.harness import TOLERANCE, Case, Contender, backends, compiled
from benchmarks.peers import logprobs as theirs
from fastppo.ops import policy_loss, workspace
from fastppo.ops.arguments import loss_arguments, row_arguments
from fastppo.ops.policy_loss import DenseRows, sweep
from tests.ops.registry import OPS, Op, Shape

# SmolLM2's head and Qwen2.5-0.5B's; 64 sequences of 1024 tokens for what has no vocabulary.
ROWS = (Shape(512, 49152, 576, 8), Shape(256, 151936, 896, 8))
TOKENS = (Shape(65536, batch=64),)
QUICK_ROWS, QUICK_TOKENS = (Shape(6, 64, 8, 2),), (Shape(32, batch=4),)
DTYPES = (torch.float32, torch.bfloat16)
# Logits that a GEMM rounds to bf16 move a ratio by as much as a percent or two.
LINEAR_BF16 = 6e-2

CLIP_ALONE = "no entropy, no KL"
GIVEN, FRESH, IN_PLACE = "copy, given buffer", "copy, fresh", "copy, in place"
GEMMS = "2 GEMMs, given buffers"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(op: Op, shape: Shape) -> str:
    """The sizes that the operator has."""
    if op.name.startswith("linear"):
        return f"N {shape.n}, D {shape.hidden}, V {shape.vocab}"
    if "logits_NV" in op.make_inputs(Shape(1, 2, 1, 1), torch.float32, 0):
        return f"N {shape.n}, V {shape.vocab}"
    return f"B {shape.batch}, N {shape.n}"


def cases(quick: bool, only: list[str] | None = None) -> Iterator[Case]:
    """One at a time: its inputs are gone before the next is made."""
    for op in OPS.values():
        if only and op.name not in only:
            continue
        over_rows = describe(op, TOKENS[0]).startswith("N ")
        if quick:
            shapes = QUICK_ROWS if over_rows else QUICK_TOKENS
        else:
            shapes = ROWS if over_rows else TOKENS
        for shape in shapes:
            for dtype in DTYPES:
                yield make_case(op, shape, dtype, quick)
                if op.name == "policy_loss":
                    yield make_case(op, shape, dtype, quick, clip_alone=True)


def make_case(
    op: Op, shape: Shape, dtype: torch.dtype, quick: bool, clip_alone: bool = False
) -> Case:
    """The contenders of one operator, size and dtype; `clip_alone` leaves out entropy and KL."""
    inputs = eager.make_inputs(op, shape, dtype)
    if clip_alone:
        for name in ("ref_logprob_N", "kl_coef", "entropy_coef"):
            del inputs[name]
    linear = op.name.startswith("linear")
    case = Case(
        fields={
            "op": op.name,
            "shape": describe(op, shape),
            "dtype": name_of(dtype),
            **({"case": CLIP_ALONE} if clip_alone else {}),
        },
        want=eager.right_answer(op, inputs),
        tolerance=LINEAR_BF16 if linear and dtype == torch.bfloat16 else TOLERANCE[dtype],
    )
    bound = GEMMS if linear else FRESH
    if linear:
        case.work = op.flops(shape) / (4 * shape.n * shape.vocab * shape.hidden)
        add_gemms(case, inputs)
    else:
        add_copies(case, op, shape, dtype, inputs)
        if not op.differentiable and "logits_NV" in inputs:
            bound = GIVEN  # it only reads

    public = bound  # calls of the operator itself are compared with each other

    def add(
        name: str,
        function: Callable[..., Any],
        ours: bool = False,
        bound: str = bound,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        **keywords: Any,
    ) -> None:
        own = eager.leaves(op, inputs)

        def call() -> Any:
            with around():
                return eager.step(op, function, own, **keywords)

        answer = lambda: eager.answer(op, function, own, **keywords)  # noqa: E731
        case.add(Contender(name, call, answer, bound, ours, public))

    runnable, others = backends(op.name, *(x for x in inputs.values() if torch.is_tensor(x)))
    for backend in runnable:
        ours = {"ours": True, "backend": backend}
        if bound == FRESH and "logits_NV" in inputs:
            # The gradient's memory is the last one's, which nobody has any more; and new.
            add(f"fastppo {backend}", op.function, bound=GIVEN, **ours)
            cold = f"fastppo {backend}, nothing kept"
            add(cold, op.function, around=workspace.nothing_kept, **ours)
        else:
            add(f"fastppo {backend}", op.function, **ours)
        if op.name == "policy_loss":
            case.add(in_place(inputs, backend))
            case.add(into_given(inputs, backend))
        if op.name in ("token_logprobs", "policy_loss") and backend != "torch":
            # As part of a graph: the registered operator, whose gradient a tracer has seen.
            label = f"fastppo {backend}, within torch.compile"
            add(label, compiled(op.function, quick), bound=GIVEN, **ours)
    case.absent |= {f"fastppo {name}": why for name, why in others.items()}
    add("eager", eager.EAGER[op.name])
    if op.name in eager.NOT_COMPILED:
        case.absent["torch.compile"] = eager.NOT_COMPILED[op.name]
    else:
        add("torch.compile", compiled(eager.EAGER[op.name], quick))
    if op.name == "linear_token_logprobs":
        for package, what, load in theirs.WITH_ENTROPY:
            label = f"{peers.label(package)}, {what}"
            try:
                function = load()
            except (peers.Absent, ImportError) as why:
                case.absent[label] = str(why)
            else:
                add(label, without_entropy_gradient(function))
    if op.name == "gae":
        add("masked loop (verl's algorithm)", eager.gae_masked_loop)
        case.try_peer(f"{peers.label('torchrl')}, vectorised", lambda: torchrl(inputs, bound))
    return case


def add_copies(
    case: Case, op: Op, shape: Shape, dtype: torch.dtype, inputs: dict[str, Any]
) -> None:
    """One read and one write of the operator's logits, or of all the bytes that it must move."""
    moved = op.bytes_moved(shape, dtype)
    source = inputs.get("logits_NV")
    if source is None:
        source = torch.rand(moved // (2 * dtype.itemsize)).to(dtype)
    case.work = moved / (2 * source.numel() * source.element_size())
    if "logits_NV" not in inputs:
        case.add(Contender(FRESH, source.clone))
        return
    out = source.clone()
    case.add(Contender(GIVEN, lambda: out.copy_(source)))
    if not op.differentiable:
        return
    case.add(Contender(FRESH, source.clone))
    if op.name == "policy_loss":
        work = source.clone()
        case.add(Contender(IN_PLACE, lambda: work.mul_(1.0)))


def add_gemms(case: Case, inputs: dict[str, Any]) -> None:
    """The frozen head's two, all tokens at once, into memory that is there."""
    hidden, weight = inputs["hidden_ND"], inputs["weight_VD"]
    logits, back = hidden @ weight.T, torch.empty_like(hidden)

    def call() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=back)

    case.add(Contender(GEMMS, call))


class _Handed(torch.autograd.Function):
    """A buffer as if some operation had made it, without the operation's time."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, buffer: Tensor) -> Tensor:
        ctx.mark_dirty(buffer)
        return buffer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        _Handed.grad = grad
        return None, None


def in_place(inputs: dict[str, Any], backend: str) -> Contender:
    """The public operator over logits that it may write over; what is in them does not matter."""
    rest = {name: x for name, x in inputs.items() if name != "logits_NV"}
    leaf = torch.zeros((), requires_grad=True)
    work = inputs["logits_NV"].clone()

    def call() -> Any:
        work.detach_()
        result = policy_loss(_Handed.apply(leaf, work), **rest, inplace=True, backend=backend)
        result.loss.backward()
        return result

    def answer() -> list[Tensor]:
        work.detach_().copy_(inputs["logits_NV"])
        result = call()
        return [*(x.detach() for x in result[:4]), _Handed.grad.clone()]

    return Contender(f"fastppo {backend}, in place", call, answer, IN_PLACE, ours=True)


def into_given(inputs: dict[str, Any], backend: str) -> Contender:
    """Below autograd: loss, statistics and the gradient into a buffer that is there."""
    rest = dict(inputs)
    logits_NV = rest.pop("logits_NV")
    out_NV = torch.zeros_like(logits_NV)
    rows = row_arguments(
        "policy_loss",
        rest.pop("token_N"),
        logits_NV,
        logits_NV.shape[1],
        temperature=1.0,
        softcap=None,
        ignore_index=-100,
        check=False,
    )
    loss = loss_arguments(
        "policy_loss",
        logits_NV,
        **{"ref_logprob_N": None, "kl_coef": None, "entropy_coef": None, **rest},
        importance_weight_N=None,
        offsets=None,
        config=None,
        grad_scale=None,
    )
    chunks = DenseRows(logits_NV, out_NV)

    def call() -> Any:
        return sweep(chunks, rows, loss, logits_NV, True, backend)

    def answer() -> list[Tensor]:
        return [*call()[:4], out_NV]

    return Contender(f"fastppo {backend}, given buffer", call, answer, GIVEN, ours=True)


def without_entropy_gradient(function: theirs.WithEntropy) -> theirs.WithEntropy:
    """A peer's log-prob and entropy by our names, the entropy a value, as ours is by default."""

    def call(hidden_ND: Tensor, weight_VD: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        logprob_N, entropy_N = function(hidden_ND, weight_VD, token_N)
        return logprob_N, entropy_N.detach()

    return call


def torchrl(inputs: dict[str, Any], bound: str) -> Contender:
    """Its vectorised GAE, a convolution with the powers of gamma lam."""
    module = peers.load("torchrl", "torchrl.objectives.value.functional")
    batch = inputs["offsets"].numel() - 1
    value_BT1 = inputs["value_N"].float().view(batch, -1, 1)
    reward_BT1 = inputs["reward_N"].float().view(batch, -1, 1)
    next_BT1 = torch.cat([value_BT1[:, 1:], torch.zeros(batch, 1, 1)], dim=1)
    done_BT1 = torch.zeros_like(value_BT1, dtype=torch.bool)
    done_BT1[:, -1] = True

    def call() -> list[Tensor]:
        advantage, returns = module.vec_generalized_advantage_estimate(
            inputs["gamma"], 0.95, value_BT1, next_BT1, reward_BT1, done_BT1, done_BT1
        )
        return [advantage.flatten(), returns.flatten()]

    return Contender(f"{peers.label('torchrl')}, vectorised", call, call, bound)
