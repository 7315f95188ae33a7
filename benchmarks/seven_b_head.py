"""The head of a 7B (Qwen2.5's: D 3584, V 152064) in bf16: the loss in under 1 GB above its weight.

All logits of 2048 tokens are 0.6 GB in bf16, and eager holds five such buffers, four in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import contenders as eager
from benchmarks.harness import Case, Contender, backends
from benchmarks.linear import bare_gemms
from benchmarks.ops import LINEAR_BF16
from fastppo.ops import linear_policy_loss
from tests.ops.references import linear_policy_loss_reference
from tests.ops.registry import Shape

HEAD = Shape(2048, 152064, 3584)
QUICK = Shape(6, 64, 8)
LIMIT_BYTES = 10**9
BLOCK = 128  # tokens, of the oracle
BOUND = "2 GEMMs, given buffers"


def cases(quick: bool, n: int = HEAD.n) -> Iterator[Case]:
    """The one case."""
    yield make_case(QUICK if quick else Shape(n, HEAD.vocab, HEAD.hidden))


def make_case(shape: Shape) -> Case:
    inputs = make_inputs(shape)
    hidden, weight = inputs["hidden_ND"], inputs["weight_VD"]
    case = Case(
        fields={
            "shape": f"N {shape.n}, D {shape.hidden}, V {shape.vocab}",
            "case": "frozen head",
            "dtype": "bfloat16",
        },
        want=right_answer(inputs),
        tolerance=LINEAR_BF16,
    )
    case.add(Contender(BOUND, bare_gemms(hidden, weight, count=2)))
    leaf = hidden.detach().requires_grad_()

    def add(name: str, loss_of: Callable[[], Tensor], ours: bool = False) -> None:
        def step() -> Tensor:
            leaf.grad = None
            loss = loss_of()
            loss.backward()
            return loss.detach()

        case.add(Contender(name, step, lambda: [step(), leaf.grad], BOUND, ours))

    given = {**inputs, "hidden_ND": leaf}
    runnable, others = backends("linear_policy_loss", hidden)
    for backend in runnable:
        add(
            f"fastppo {backend}",
            lambda backend=backend: linear_policy_loss(**given, backend=backend).loss,
            ours=True,
        )
    case.absent |= {f"fastppo {name}": why for name, why in others.items()}

    def plain() -> Tensor:
        log_p_NV = torch.log_softmax((leaf @ weight.T).float(), dim=-1)
        logprob_N = log_p_NV.gather(1, inputs["token_N"][:, None]).squeeze(1)
        names = ("behaviour_logprob_N", "advantage_N", "weight_N")
        return eager.clipped_loss(logprob_N, *(inputs[name] for name in names))

    add("eager, all logits", plain)
    return case


def make_inputs(shape: Shape) -> dict[str, Any]:
    """Without a float64 copy of anything, which the registry's inputs take."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.n, shape.hidden, generator=generator).bfloat16()
    weight = torch.randn(shape.vocab, shape.hidden, generator=generator, dtype=torch.bfloat16)
    weight *= 2 / shape.hidden**0.5
    token = torch.randint(shape.vocab, (shape.n,), generator=generator)
    moved, advantage = torch.randn(2, shape.n, generator=generator)
    wide = weight.float()
    parts = [
        eager.token_logprobs(rows.float() @ wide.T, at)[0]
        for rows, at in zip(hidden.split(BLOCK), token.split(BLOCK), strict=True)
    ]
    logprob = torch.cat(parts)
    return {
        "hidden_ND": hidden,
        "weight_VD": weight,
        "token_N": token,
        "behaviour_logprob_N": eager.off_the_edges(logprob, logprob + 0.3 * moved),
        "advantage_N": advantage,
        "weight_N": torch.full((shape.n,), 1 / shape.n),
    }


def right_answer(inputs: dict[str, Any]) -> list[Tensor]:
    """Loss and gradient of the definition in float32, some tokens at a time: the loss is a sum."""
    rest = {name: x for name, x in inputs.items() if name not in ("hidden_ND", "weight_VD")}
    wide = inputs["weight_VD"].float()
    losses, grads = [], []
    for start in range(0, inputs["hidden_ND"].shape[0], BLOCK):
        rows = slice(start, start + BLOCK)
        leaf = inputs["hidden_ND"][rows].float().requires_grad_()
        some = {name: x[rows] for name, x in rest.items()}
        loss = linear_policy_loss_reference(leaf, wide, **some).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append(leaf.grad)
    return [torch.stack(losses).sum(), torch.cat(grads)]


def memory_note(rows: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """What each of ours took above the weight, and whether it is under the limit."""
    ours = [row for row in rows if row.get("ours") and row["status"] == "timed"]
    notes = [
        f"{row['what']}: {row['peak_bytes'] / 1e9:.3f} GB above the weight, limit "
        f"{LIMIT_BYTES / 1e9:.0f} GB"
        for row in ours
    ]
    return notes, all(row["peak_bytes"] < LIMIT_BYTES for row in ours)
