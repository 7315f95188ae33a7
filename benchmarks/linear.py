"""PPO's loss from hidden states, forward and backward, against GEMMs, eager, compile and peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import contenders as eager
from benchmarks import peers
from benchmarks.harness import TOLERANCE, Case, Contender, backends, compiled
from fastppo.ops import linear_policy_loss
from tests.ops.references import linear_policy_loss_reference
from tests.ops.registry import OPS, Shape

SHAPES = (Shape(512, 49152, 576, 1), Shape(256, 151936, 896, 1))
QUICK = (Shape(6, 64, 8, 1),)
VERL_CHUNK = 512

# (hidden, weight, token) -> log-prob of each token; the loss of log-probs is everybody's own.
Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(quick: bool) -> Iterator[Case]:
    """Frozen and trained head at each size."""
    for shape in QUICK if quick else SHAPES:
        for trained in (False, True):
            yield make_case(shape, trained, quick)


def make_case(shape: Shape, trained: bool, quick: bool) -> Case:
    inputs = eager.make_inputs(OPS["linear_policy_loss"], shape, torch.float32)
    for name in ("ref_logprob_N", "kl_coef", "entropy_coef"):
        del inputs[name]  # no peer has these terms
    names = ("behaviour_logprob_N", "advantage_N", "weight_N")
    rest = tuple(inputs[name] for name in names)
    hidden = inputs["hidden_ND"].requires_grad_()
    weight = inputs["weight_VD"].requires_grad_(trained)
    token = inputs["token_N"]
    leaves = (hidden, weight) if trained else (hidden,)

    def step(loss_of: Callable[[], Tensor]) -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss = loss_of()
        loss.backward()
        return loss.detach()

    def answer(loss_of: Callable[[], Tensor]) -> list[Tensor]:
        return [step(loss_of), *(leaf.grad for leaf in leaves)]

    case = Case(
        fields={
            "shape": f"N {shape.n}, D {shape.hidden}, V {shape.vocab}",
            "case": "trained head" if trained else "frozen head",
            "dtype": "float32",
        },
        want=answer(lambda: linear_policy_loss_reference(**inputs).loss),
        tolerance=TOLERANCE[torch.float32],
    )
    bound = f"{3 if trained else 2} GEMMs, given buffers"
    case.add(Contender(bound, bare_gemms(hidden.detach(), weight.detach(), trained)))

    def add(name: str, loss_of: Callable[[], Tensor], ours: bool = False) -> None:
        case.add(Contender(name, lambda: step(loss_of), lambda: answer(loss_of), bound, ours))

    def peer(package: str, what: str, make: Callable[[], Logprobs]) -> None:
        try:
            logprobs = make()
        except (peers.Absent, ImportError) as why:
            case.absent[f"{peers.label(package)}, {what}"] = str(why)
            return
        add(
            f"{peers.label(package)}, {what}",
            lambda: eager.clipped_loss(logprobs(hidden, weight, token), *rest),
        )

    def plain(hidden: Tensor, weight: Tensor, token: Tensor, *rest: Tensor) -> Tensor:
        log_p_NV = torch.log_softmax(hidden @ weight.T, dim=-1)
        return eager.clipped_loss(log_p_NV.gather(1, token[:, None]).squeeze(1), *rest)

    runnable, others = backends("linear_policy_loss", hidden)
    for backend in runnable:
        add(
            f"fastppo {backend}",
            lambda backend=backend: linear_policy_loss(**inputs, backend=backend).loss,
            ours=True,
        )
    case.absent |= {f"fastppo {name}": why for name, why in others.items()}
    add("eager", lambda: plain(hidden, weight, token, *rest))
    fused = compiled(plain, quick)
    add("torch.compile", lambda: fused(hidden, weight, token, *rest))
    peer("liger-kernel", "chunked selective log-prob", liger)
    peer("cut-cross-entropy", "torch_compile", cut_cross_entropy)
    peer("verl", f"FusedLinearForPPO, chunk {VERL_CHUNK}, entropy too", verl)
    return case


def bare_gemms(hidden: Tensor, weight: Tensor, trained: bool) -> Callable[[], None]:
    """The products alone, all tokens at once, into memory that is there."""
    logits, back = hidden @ weight.T, torch.empty_like(hidden)
    grad = torch.empty_like(weight) if trained else None

    def call() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=back)
        if grad is not None:
            torch.mm(logits.T, hidden, out=grad)

    return call


def liger() -> Logprobs:
    module: Any = peers.load("liger-kernel", "liger_kernel.chunked_loss.fused_linear_ppo")
    forward = module.LigerFusedLinearPPOBase.chunk_forward
    return lambda hidden, weight, token: forward(hidden[None], weight, token[None])[0]


def cut_cross_entropy() -> Logprobs:
    module: Any = peers.load("cut-cross-entropy", "cut_cross_entropy.torch_compile")
    loss = module.torch_compile_linear_cross_entropy
    return lambda hidden, weight, token: -loss(hidden, weight, token, reduction="none")


def verl() -> Logprobs:
    module: Any = peers.load("verl", "verl.utils.experimental.torch_functional")
    head = module.FusedLinearForPPO(chunk_size=VERL_CHUNK)
    return lambda hidden, weight, token: head(hidden, weight, token)[0]
