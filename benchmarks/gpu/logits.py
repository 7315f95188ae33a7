"""Operators over logits: their share of a copy, against eager, torch.compile and the peers.

A loss with its gradient has to read the logits once and to write as much, as a copy does; log-probs
have to read them once. That share of a copy's speed is what is shown, whatever a contender moves.
The most important first, since the section may be cut off: all vocabularies without torch.compile,
the launch sizes of the loss, torch.compile, the launch sizes of the other kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import clipped_loss, token_logprobs
from benchmarks.contenders import policy_loss as eager_loss
from benchmarks.gpu import candidates, peers
from benchmarks.gpu.plan import Add, Plan
from benchmarks.gpu.timing import Contender, compile_all, failure, in_turns
from benchmarks.gpu.timing import measure as measure_contenders
from fastppo import ops

Inputs = dict[str, Any]
# Answers are compared on so many rows, since the definition in float32 is large.
COMPARED = 64
TRITON = {"backend": "triton"}


def measure(plan: Plan, add: Add) -> list[str]:
    """A row for every contender at every size; returns what of ours is wrong."""
    first, *others = candidates.KERNELS
    parts = (
        partial(compare, contenders_of_a_case),
        partial(try_sizes, [first]),
        partial(compare, compiled_of_a_case),
        partial(try_sizes, others),
    )
    wrong = []
    for part in parts:
        for vocab, dtype in cases(plan):
            wrong += part(make_inputs(plan, vocab, dtype), plan, add)
            release(plan)
    return wrong


def compare(
    make: Callable[[Inputs, Plan], Iterator[Contender]], given: Inputs, plan: Plan, add: Add
) -> list[str]:
    """Contenders of one vocabulary and dtype against each other."""
    n, vocab = given["logits"].shape
    dtype = given["logits"].dtype
    fields = {"rows": n, "vocab": vocab, "dtype": name_of(dtype)}
    return measure_contenders(list(make(given, plan)), plan, add, fields, dtype, bound="copy")


def cases(plan: Plan) -> Iterator[tuple[int, torch.dtype]]:
    return ((vocab, dtype) for dtype in plan.dtypes for vocab in plan.vocabularies)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def release(plan: Plan) -> None:
    """Give freed memory back, the next case's sizes being others."""
    if plan.cuda:
        torch.cuda.empty_cache()


def make_inputs(plan: Plan, vocab: int, dtype: torch.dtype) -> Inputs:
    """Logits with the spread of a language model's, and vectors of a policy that has moved."""
    device, n = plan.device, plan.rows
    generator = torch.Generator(device=device).manual_seed(0)
    logits = torch.randn(n, vocab, device=device, generator=generator).mul_(2).to(dtype)
    token = torch.randint(vocab, (n,), device=device, generator=generator)
    logprob = torch.cat(
        [token_logprobs(x, t)[0] for x, t in zip(logits.split(256), token.split(256), strict=True)]
    )
    moved = torch.tensor([-0.5, -0.05, 0.05, 0.5], device=device)  # none at an edge of the clip
    return {
        "logits": logits,
        "other": logits + 0.1,
        "buffer": torch.empty_like(logits),
        "leaf": logits.clone().requires_grad_(),
        "token": token,
        "behaviour": logprob + moved[torch.arange(n, device=device) % 4],
        "ref": logprob - 0.1,
        "advantage": torch.randn(n, device=device, generator=generator),
        "weight": torch.full((n,), 1 / n, device=device),
    }


def vectors(given: Inputs, rows: slice) -> tuple[Tensor, ...]:
    """The losses' arguments behind the logits."""
    names = ("token", "behaviour", "advantage", "weight")
    return tuple(given[name][rows] for name in names)


EVERY = slice(None)
FIRST = slice(0, COMPARED)


def our_loss(logits: Tensor, given: Inputs, rows: slice = EVERY, **more: Any) -> Tensor:
    return ops.policy_loss(logits, *vectors(given, rows), **more, **TRITON).loss


def plain_eager(logits: Tensor, given: Inputs, rows: slice = EVERY) -> Tensor:
    """PPO's clip and no more, as trainers write it."""
    token, *rest = vectors(given, rows)
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return clipped_loss(log_p.gather(1, token[:, None]).squeeze(1), *rest)


def full_eager(logits: Tensor, given: Inputs, rows: slice = EVERY) -> Tensor:
    """With k3 to a reference and an entropy bonus."""
    return eager_loss(logits, *vectors(given, rows), given["ref"][rows], 0.1, 0.01).loss


def of_tokens(nll: Tensor, given: Inputs, rows: slice = EVERY) -> Tensor:
    """The plain loss of a peer's log-probs."""
    _, *rest = vectors(given, rows)
    return clipped_loss(-nll.float(), *rest)


def full_terms(given: Inputs) -> Inputs:
    return {"ref_logprob_N": given["ref"], "kl_coef": 0.1, "entropy_coef": 0.01}


Loss = Callable[[Tensor, Inputs], Tensor]


def backward(given: Inputs, loss: Loss) -> Tensor:
    """A loss and its gradient; not in `.grad`, whose stream a CUDA graph would wait for."""
    leaf = given["leaf"]
    (gradient,) = torch.autograd.grad(loss(leaf, given), leaf)
    return gradient


def gradient(given: Inputs, loss: Loss) -> list[Tensor]:
    """The gradient's first rows."""
    return [backward(given, loss)[FIRST].clone()]


def gradient_wanted(given: Inputs, loss: Callable[..., Tensor]) -> list[Tensor]:
    """The same by eager PyTorch from float32 logits."""
    leaf = given["logits"][FIRST].float().requires_grad_()
    return [*torch.autograd.grad(loss(leaf, given, FIRST), leaf)]


def logprob_wanted(given: Inputs) -> list[Tensor]:
    return [token_logprobs(given["logits"][FIRST], given["token"][FIRST])[0]]


def contenders_of_a_case(given: Inputs, plan: Plan) -> Iterator[Contender]:
    """All but torch.compile; the copy first, against which the others are measured."""
    logits, token = given["logits"], given["token"]
    size = logits.numel() * logits.element_size()
    plain = partial(gradient_wanted, given, plain_eager)
    full = partial(gradient_wanted, given, full_eager)
    yield Contender("copy", lambda: given["buffer"].copy_(logits), moved=2 * size)

    def with_loss(name: str, loss: Loss, want: Any, **more: Any) -> Contender:
        call, answer = partial(backward, given, loss), partial(gradient, given, loss)
        return Contender(name, call, answer, want, **more)

    def our_logprobs() -> Tensor:
        with torch.no_grad():
            return ops.token_logprobs(logits, token, **TRITON).logprob_N

    # Written over its own input again and again: what the numbers are does not matter to the time.
    sizes, table = candidates.launch_sizes("policy_loss", logits.element_size(), logits.shape[1])
    own = {**given, "logits": given["other"], "buffer": given["other"]}
    in_place = candidates.forced("policy_loss", own, sizes[table])

    yield with_loss("policy_loss", lambda x, g: our_loss(x, g), plain, moved=2 * size, ours=True)
    yield with_loss(
        "policy_loss, entropy and k3",
        lambda x, g: our_loss(x, g, **full_terms(g)),
        full,
        moved=2 * size,
        ours=True,
    )
    yield Contender(
        "token_logprobs",
        our_logprobs,
        lambda: [our_logprobs()[FIRST]],
        partial(logprob_wanted, given),
        moved=size,
        ours=True,
    )
    yield with_loss(
        "token_logprobs, loss and backward",
        lambda x, g: of_tokens(-ops.token_logprobs(x, token, **TRITON).logprob_N, g),
        plain,
        moved=2 * size,
        ours=True,
    )
    yield Contender(
        "score_tokens",
        lambda: ops.score_tokens(logits, given["other"], token, **TRITON),
        moved=2 * size,
        ours=True,
    )
    yield Contender("policy_loss, its kernel in place", in_place, moved=2 * size, ours=True)
    yield with_loss("eager loss", plain_eager, plain, moved=2 * size)
    yield with_loss("eager loss, entropy and k3", full_eager, full, moved=2 * size)
    for name, load in peers.of_logits():
        try:
            nll = load()
        except Exception as error:  # a package that is there and cannot be imported
            print(f"{name}: {failure(error)}", flush=True)
            continue

        def their_logprobs(nll: peers.OfLogits = nll) -> Tensor:
            with torch.no_grad():
                return -nll(logits, token).float()

        yield Contender(
            f"{name}, log-probs",
            their_logprobs,
            lambda call=their_logprobs: [call()[FIRST]],
            partial(logprob_wanted, given),
            moved=size,
        )
        yield with_loss(
            f"{name}, loss and backward",
            lambda x, g, nll=nll: of_tokens(nll(x, token), g),
            plain,
            moved=2 * size,
        )


def compiled_of_a_case(given: Inputs, plan: Plan) -> Iterator[Contender]:
    """torch.compile of the eager losses, with the copy and ours beside them."""
    size = given["logits"].numel() * given["logits"].element_size()
    yield Contender("copy", lambda: given["buffer"].copy_(given["logits"]), moved=2 * size)
    backend = "inductor" if plan.cuda else "eager"
    for name, loss in (("loss", plain_eager), ("loss, entropy and k3", full_eager)):
        torch._dynamo.reset()  # every size is a graph of its own, and eight are its limit
        fused = torch.compile(loss, dynamic=False, backend=backend)
        yield Contender(
            f"torch.compile {name}",
            partial(backward, given, fused),
            partial(gradient, given, fused),
            partial(gradient_wanted, given, loss),
            moved=2 * size,
        )


def try_sizes(kernels: Sequence[str], given: Inputs, plan: Plan, add: Add) -> list[str]:
    """Time these kernels at every size that their launches may have."""
    return [why for kernel in kernels for why in try_kernel(kernel, given, plan, add)]


def try_kernel(kernel: str, given: Inputs, plan: Plan, add: Add) -> list[str]:
    """Time a kernel at every size that its launch may have, against the table's."""
    logits = given["logits"]
    sizes, table = candidates.launch_sizes(kernel, logits.element_size(), logits.shape[1])
    if not plan.cuda:
        sizes = {table: sizes[table]}
    calls = {name: candidates.forced(kernel, given, config) for name, config in sizes.items()}
    compile_all(list(calls.values()), plan)
    fields = {"kernel": kernel, "vocab": logits.shape[1], "dtype": name_of(logits.dtype)}
    working, wrong = {}, []
    for name, call in calls.items():
        try:
            call()
        except Exception as error:  # too many registers, too much shared memory
            add(**fields, size=name, in_table=name == table, note=failure(error))
            wrong += [f"{kernel}: {failure(error)}"] if name == table else []
            continue
        working[name] = call
    if plan.warm:
        return wrong
    times = in_turns(working, plan)
    for name, taken in times.items():
        ms = sorted(taken)[len(taken) // 2]
        add(**fields, size=name, ms=round(ms, 5), in_table=name == table)
    return wrong
