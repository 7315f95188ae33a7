"""Losses of log-probs from hidden states, with their gradients: GEMMs, eager, compile, peers.

Three losses, each with a frozen and with a trained head: PPO's clip, GRPO's (a clip, and k3 to a
reference, averaged by sequence) and GSPO's (a ratio for each sequence). fastppo has PPO's fused
(`linear_policy_loss`); with `linear_token_logprobs` the loss is the trainer's own PyTorch, and so
it is with all peers. Of 16-bit operands fastppo makes float32 logits, or those of the operands'
dtype where it is told so: each against GEMMs with the same logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import contenders as eager
from benchmarks import peers
from benchmarks.harness import TOLERANCE, Case, Contender, backends, compiled
from benchmarks.ops import DTYPES, LINEAR_BF16, name_of
from benchmarks.peers import logprobs as theirs
from fastppo.ops import linear_policy_loss, linear_token_logprobs
from fastppo.ops.word_blocks import LEAST_TOKENS, logits_fit
from tests.ops.references import linear_policy_loss_reference
from tests.ops.registry import OPS, Shape

SHAPES = (Shape(512, 49152, 576, 8), Shape(256, 151936, 896, 8))
QUICK = (Shape(6, 64, 8, 2),)
BY_NAME = {name_of(dtype): dtype for dtype in DTYPES}
LOSSES = ("PPO", "GRPO", "GSPO")
BETA = 0.04

# Log-prob of each token -> the loss.
Loss = Callable[[Tensor], Tensor]


def cases(quick: bool, tokens: Collection[int], dtype: torch.dtype) -> Iterator[Case]:
    """Each loss at each size of so many tokens, with a frozen and with a trained head."""
    for shape in QUICK if quick else [shape for shape in SHAPES if shape.n in tokens]:
        for loss in LOSSES:
            for trained in (False, True):
                yield make_case(shape, loss, trained, quick, dtype)


def ours(cases: Iterable[Case]) -> Iterator[Case]:
    """The cases without other contenders, which take most of the time."""
    for case in cases:
        bounds = {contender.bound for contender in case.contenders if contender.ours}
        case.contenders = [
            contender
            for contender in case.contenders
            if contender.name in bounds or (contender.ours and " torch," not in contender.name)
        ]
        yield case


def make_case(shape: Shape, name: str, trained: bool, quick: bool, dtype: torch.dtype) -> Case:
    inputs = eager.make_inputs(OPS["linear_policy_loss"], shape, dtype)
    for key in ("kl_coef", "entropy_coef"):
        del inputs[key]  # no peer has these terms
    ref_logprob_N = inputs.pop("ref_logprob_N")
    hidden = inputs["hidden_ND"].requires_grad_()
    weight = inputs["weight_VD"].requires_grad_(trained)
    token = inputs["token_N"]
    leaves = (hidden, weight) if trained else (hidden,)
    loss = make_loss(name, shape.batch, inputs, ref_logprob_N)

    def step(make: Callable[[], Tensor]) -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        value = make()
        value.backward()
        return value.detach()

    def answer(make: Callable[[], Tensor]) -> list[Tensor]:
        return [step(make), *(leaf.grad for leaf in leaves)]

    def plain(hidden: Tensor, weight: Tensor, token: Tensor) -> Tensor:
        log_p_NV = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
        return loss(log_p_NV.gather(1, token[:, None]).squeeze(1))

    def definition() -> list[Tensor]:
        """In float32."""
        wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
        given = {"hidden_ND": wide[0], "weight_VD": wide[1] if trained else weight.float()}
        if name == "PPO":
            value = linear_policy_loss_reference(**{**inputs, **given}).loss
        else:
            value = plain(*given.values(), token)
        return [value.detach(), *torch.autograd.grad(value, wide)]

    case = Case(
        fields={
            "shape": f"N {shape.n}, D {shape.hidden}, V {shape.vocab}",
            "case": f"{name}, {'trained' if trained else 'frozen'} head",
            "dtype": name_of(dtype),
        },
        want=definition(),
        tolerance=TOLERANCE[dtype] if dtype == torch.float32 else LINEAR_BF16,
    )
    least = 3 if trained else 2
    fits = shape.n >= LEAST_TOKENS and logits_fit(hidden)

    def gemms(count: int, logits: torch.dtype) -> str:
        bound = f"{count} GEMMs, given buffers"
        if dtype != torch.float32:
            bound = f"{count} GEMMs, {name_of(logits)} logits, given buffers"
        if bound not in {contender.name for contender in case.contenders}:
            call = bare_gemms(hidden.detach(), weight.detach(), count, logits)
            case.add(Contender(bound, call))
        return bound

    once = gemms(least, dtype)

    def add(what: str, make: Callable[[], Tensor], bound: str = once, ours: bool = False) -> None:
        case.add(Contender(what, lambda: step(make), lambda: answer(make), bound, ours, once))

    def variants() -> Iterator[tuple[str, torch.dtype, dict[str, Any]]]:
        """Which logits fastppo may make: label, dtype, keywords."""
        if dtype == torch.float32:
            yield "", torch.float32, {}
            return
        for logits in (torch.float32, dtype):
            yield f", {name_of(logits)} logits", logits, {"logits_dtype": logits}

    if name == "PPO":
        runnable, others = backends("linear_policy_loss", hidden)
        for backend, (label, logits, how) in itertools.product(runnable, variants()):
            given = {**inputs, **how, "backend": backend}
            add(
                f"fastppo {backend}, linear_policy_loss{label}",
                lambda given=given: linear_policy_loss(**given).loss,
                gemms(least, logits),
                ours=True,
            )
        case.absent |= {f"fastppo {backend}": why for backend, why in others.items()}
    runnable, _ = backends("linear_token_logprobs", hidden)
    for backend, (label, logits, how) in itertools.product(runnable, variants()):
        # It does not know the loss: a trained head's logits are kept in the memory of the weight's
        # gradient, or made a second time.
        again = trained and not (backend == "native" and fits)
        given = {**how, "backend": backend}
        add(
            f"fastppo {backend}, linear_token_logprobs{label}",
            lambda given=given: loss(
                linear_token_logprobs(hidden, weight, token, **given).logprob_N
            ),
            gemms(4 if again else least, logits),
            ours=True,
        )
    add("eager", lambda: plain(hidden, weight, token))
    fused = compiled(plain, quick)
    add("torch.compile", lambda: fused(hidden, weight, token))
    for package, what, make in theirs.ALL if name == "PPO" else theirs.MODERN:
        label = f"{peers.label(package)}, {what}"
        try:
            logprobs = make()
        except (peers.Absent, ImportError) as why:
            case.absent[label] = str(why)
            continue
        add(label, lambda logprobs=logprobs: loss(logprobs(hidden, weight, token)))
    return case


def make_loss(name: str, batch: int, inputs: dict[str, Any], ref_logprob_N: Tensor) -> Loss:
    """A loss in plain PyTorch over `batch` sequences of one length."""
    behaviour_N, advantage_N = inputs["behaviour_logprob_N"], inputs["advantage_N"]
    if name == "PPO":
        return lambda x_N: eager.clipped_loss(x_N, behaviour_N, advantage_N, inputs["weight_N"])
    advantage_B = advantage_N.view(batch, -1)[:, 0]
    if name == "GRPO":
        return lambda x_N: grpo_loss(x_N, behaviour_N, ref_logprob_N, advantage_B)
    return lambda x_N: gspo_loss(x_N, behaviour_N, advantage_B)


def grpo_loss(
    logprob_N: Tensor, behaviour_logprob_N: Tensor, ref_logprob_N: Tensor, advantage_B: Tensor
) -> Tensor:
    """GRPO's: clipped by token, k3 to the reference, the mean of the sequences' means."""
    ratio_N = (logprob_N - behaviour_logprob_N).exp()
    ratio_BT, advantage_B1 = ratio_N.view(len(advantage_B), -1), advantage_B[:, None]
    held_BT = ratio_BT.clamp(1 - eager.CLIP, 1 + eager.CLIP)
    clip_BT = torch.max(-advantage_B1 * ratio_BT, -advantage_B1 * held_BT)
    kl_BT = eager.token_kl(logprob_N, ref_logprob_N).view_as(clip_BT)
    return (clip_BT + BETA * kl_BT).mean(1).mean()


def gspo_loss(logprob_N: Tensor, behaviour_logprob_N: Tensor, advantage_B: Tensor) -> Tensor:
    """GSPO's: the ratio of a sequence is the geometric mean of its tokens'."""
    ratio_B = (logprob_N - behaviour_logprob_N).view(len(advantage_B), -1).mean(1).exp()
    held_B = ratio_B.clamp(1 - eager.CLIP, 1 + eager.CLIP)
    return torch.max(-advantage_B * ratio_B, -advantage_B * held_B).mean()


def bare_gemms(
    hidden: Tensor, weight: Tensor, count: int, logits_dtype: torch.dtype | None = None
) -> Callable[[], None]:
    """The products alone, all tokens at once, into memory that is there.

    2: the logits and the gradient of the hidden states. 3: the gradient of the weight too. 4: the
    logits twice, as where the forward keeps none of them. Float32 logits of 16-bit operands are a
    product of these in float32, which are given too; their gradient has 16 bits.
    """
    wide = [x.to(logits_dtype or x.dtype) for x in (hidden, weight.T)]
    logits, back = torch.mm(*wide), torch.empty_like(hidden)
    small = logits.to(hidden.dtype)
    grad = torch.empty_like(weight) if count > 2 else None

    def call() -> None:
        for _ in range(2 if count == 4 else 1):
            torch.mm(*wide, out=logits)
        torch.mm(small, weight, out=back)
        if grad is not None:
            torch.mm(small.T, hidden, out=grad)

    return call


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """For each case, what ours take in units of the bare GEMMs that the call cannot do without."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.get("ours") and "share" in row:
            name = row["what"].removeprefix("fastppo ")
            gemms = row["bound"].removesuffix(", given buffers")
            line = f"{name} {1 / row['share']:.2f} x {gemms}"
            found.setdefault((row["shape"], row["case"]), []).append(line)
    return [f"{shape}, {case}: {'; '.join(lines)}" for (shape, case), lines in found.items()]
