"""Log-probs and losses from hidden states at the shapes for which Liger-Kernel publishes times.

TFLOP/s count the GEMMs that nobody can do without: one for log-probs, two with the gradient of the
hidden states, three with that of the weight too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import clipped_loss, token_logprobs
from benchmarks.gpu import peers
from benchmarks.gpu.plan import Add, Plan
from benchmarks.gpu.timing import Contender, failure
from benchmarks.gpu.timing import measure as measure_contenders
from fastppo import ops

Inputs = dict[str, Any]
Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]
COMPARED = 64
TRITON = {"backend": "triton"}


def measure(plan: Plan, add: Add) -> list[str]:
    """A row for every contender at every size; returns what of ours is wrong."""
    wrong = []
    # torch.compile last: it takes longest to begin.
    for part in (contenders_of_a_case, compiled_of_a_case):
        for count in plan.tokens:
            for trained in (None, False, True):
                given = make_inputs(plan, count, trained)
                head = {None: "no gradient", False: "frozen", True: "trained"}[trained]
                fields = {"tokens": count, "hidden": plan.hidden, "vocab": plan.head, "head": head}
                found = list(part(given, plan))
                wrong += measure_contenders(found, plan, add, fields, torch.bfloat16)
                del given, found
                if plan.cuda:
                    torch.cuda.empty_cache()
    return wrong


def make_inputs(plan: Plan, count: int, trained: bool | None) -> Inputs:
    """Hidden states and a head in bfloat16; `trained` is None where nothing has a gradient."""
    device, dtype = plan.device, torch.bfloat16
    generator = torch.Generator(device=device).manual_seed(0)
    draw = partial(torch.randn, device=device, generator=generator)
    hidden = draw(count, plan.hidden).to(dtype)
    weight = draw(plan.head, plan.hidden).mul_(2 / plan.hidden**0.5).to(dtype)
    token = torch.randint(plan.head, (count,), device=device, generator=generator)
    parts = zip(hidden.split(256), token.split(256), strict=True)
    logprob = torch.cat([token_logprobs(h.float() @ weight.float().T, t)[0] for h, t in parts])
    moved = torch.tensor([-0.5, -0.05, 0.05, 0.5], device=device)  # none at an edge of the clip
    return {
        "hidden": hidden.requires_grad_(trained is not None),
        "weight": weight.requires_grad_(bool(trained)),
        "token": token,
        "logprob": logprob,
        "trained": trained,
        "vectors": (
            logprob + moved[torch.arange(count, device=device) % 4],
            draw(count),
            torch.full((count,), 1 / count, device=device),
        ),
    }


def loss_of(given: Inputs, logprobs: Logprobs) -> Tensor:
    return clipped_loss(
        logprobs(given["hidden"], given["weight"], given["token"]).float(), *given["vectors"]
    )


def backward(given: Inputs, loss: Callable[[Inputs], Tensor]) -> tuple[Tensor, ...]:
    """A loss and its gradients."""
    return torch.autograd.grad(loss(given), leaves(given))


def gradients(given: Inputs, loss: Callable[[Inputs], Tensor]) -> list[Tensor]:
    """That of the first hidden states, and of the first words where the head is trained."""
    return [x[:COMPARED].clone() for x in backward(given, loss)]


def leaves(given: Inputs) -> list[Tensor]:
    return [given["hidden"], given["weight"]] if given["trained"] else [given["hidden"]]


def wanted(given: Inputs) -> list[Tensor]:
    """The same by hand in float32: dlogits = g (1[v = token] - p), by 256 rows."""
    hidden, weight, token = (
        given["hidden"].detach(),
        given["weight"].detach().float(),
        given["token"],
    )
    leaf = given["logprob"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(clipped_loss(leaf, *given["vectors"]), leaf)
    of_hidden, of_words = [], torch.zeros_like(weight[:COMPARED])
    for at in torch.arange(len(token), device=token.device).split(256):
        rows = hidden[at].float()
        dlogits = torch.softmax(rows @ weight.T, dim=-1).mul_(-slope[at, None])
        dlogits.scatter_add_(1, token[at, None], slope[at, None])
        of_hidden.append(dlogits @ weight)
        of_words += dlogits[:, :COMPARED].T @ rows
    found = [torch.cat(of_hidden)[:COMPARED]]
    return [*found, of_words] if given["trained"] else found


def ours(hidden: Tensor, weight: Tensor, token: Tensor, **more: Any) -> Tensor:
    return ops.linear_token_logprobs(hidden, weight, token, **more, **TRITON).logprob_N


def our_loss(given: Inputs, **more: Any) -> Tensor:
    tensors = (given["hidden"], given["weight"], given["token"], *given["vectors"])
    return ops.linear_policy_loss(*tensors, **more, **TRITON).loss


def eager(hidden: Tensor, weight: Tensor, token: Tensor) -> Tensor:
    """All logits at once, without an entropy."""
    log_p = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    return log_p.gather(1, token[:, None]).squeeze(1)


def gemms(given: Inputs, count: int) -> Callable[[], None]:
    """The products alone, into memory that is there, all tokens at once."""
    hidden, weight = given["hidden"].detach(), given["weight"].detach()
    logits, back, grad = hidden @ weight.T, torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        torch.mm(hidden, weight.T, out=logits)
        if count > 1:
            torch.mm(logits, weight, out=back)
        if count > 2:
            torch.mm(logits.T, hidden, out=grad)

    return call


def make(given: Inputs) -> tuple[int, Callable[..., Contender]]:
    """FLOPs of the GEMMs, and what makes a contender of log-probs."""
    flops = 2 * given["weight"].numel() * len(given["token"])
    trained = given["trained"]
    count = {None: 1, False: 2, True: 3}[trained]
    want = cache(partial(wanted, given))  # the GEMMs in float32 take longest

    def contender(name: str, loss: Callable[[Inputs], Tensor], **more: Any) -> Contender:
        settings = {"flops": count * flops, "graph": False, **more}
        if trained is None:
            return Contender(
                name,
                lambda: without_gradient(given, loss),
                lambda: [without_gradient(given, loss)],
                lambda: [given["logprob"]],
                **settings,
            )
        call, answer = partial(backward, given, loss), partial(gradients, given, loss)
        return Contender(name, call, answer, want, **settings)

    return count, contender


def without_gradient(given: Inputs, loss: Callable[[Inputs], Tensor]) -> Tensor:
    with torch.no_grad():
        return loss(given)


def of(given: Inputs, logprobs: Logprobs) -> Callable[[Inputs], Tensor]:
    """What a contender is called with: log-probs, or the loss of them."""
    if given["trained"] is None:
        return lambda g: logprobs(g["hidden"], g["weight"], g["token"])
    return lambda g: loss_of(g, logprobs)


def contenders_of_a_case(given: Inputs, plan: Plan) -> Iterator[Contender]:
    """The bare GEMMs, ours, eager, and the peers."""
    count, contender = make(given)
    flops = 2 * count * given["weight"].numel() * len(given["token"])
    yield Contender(
        f"{count} bare GEMM{'s' if count > 1 else ''}",
        gemms(given, count),
        flops=flops,
        graph=False,
    )
    yield contender("linear_token_logprobs", of(given, ours), ours=True)
    narrow = partial(ours, logits_dtype=torch.bfloat16)
    yield contender(
        "linear_token_logprobs, bf16 logits", of(given, narrow), ours=True, tolerance=4e-2
    )
    if given["trained"] is not None:
        yield contender("linear_policy_loss", our_loss, ours=True)
    yield contender("eager, all logits", of(given, eager), tolerance=4e-2)
    for name, load in peers.of_hidden():
        try:
            nll = load()
        except Exception as error:  # a package that is there and cannot be imported
            print(f"{name}: {failure(error)}", flush=True)
            continue
        yield contender(name, of(given, lambda h, w, t, nll=nll: -nll(h, w, t)), tolerance=4e-2)


def compiled_of_a_case(given: Inputs, plan: Plan) -> Iterator[Contender]:
    """torch.compile of the eager log-probs."""
    torch._dynamo.reset()
    fused = torch.compile(eager, dynamic=False, backend="inductor" if plan.cuda else "eager")
    yield make(given)[1]("torch.compile, all logits", of(given, fused), tolerance=4e-2)
