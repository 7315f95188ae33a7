"""`linear_token_logprobs` with a frozen weight makes the gradient of any loss in its forward."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastppo.ops import HeadLora, TokenLogprobs, linear_token_logprobs
from tests.ops.oracle import check, place
from tests.ops.references import linear_token_logprobs_reference
from tests.ops.registry import OPS, Shape, make_hidden
from tests.tiers import interpreted, slow_unless

F64 = torch.float64
SHAPE = Shape(n=13, vocab=67, hidden=16)
WITH_ENTROPY = replace(
    OPS["linear_token_logprobs"],
    make_inputs=lambda *given: {**make_hidden(*given), "entropy_grad": True},
)
# What of the head trains beside the hidden states; the weight never.
TRAINED = ((), ("bias",), ("A", "B"), ("bias", "A", "B"))


def ppo(found: TokenLogprobs) -> torch.Tensor:
    """Clipped, by token."""
    old_N = found.logprob_N.detach() + torch.linspace(-0.5, 0.5, found.logprob_N.numel())
    advantage_N = torch.linspace(-1, 2, found.logprob_N.numel(), dtype=found.logprob_N.dtype)
    ratio_N = (found.logprob_N - old_N).exp()
    return -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(0.8, 1.2) * advantage_N).mean()


def gspo(found: TokenLogprobs) -> torch.Tensor:
    """One ratio a sequence: the gradient of a token depends on its neighbours' log-probs."""
    first, second = found.logprob_N[:5], found.logprob_N[5:]
    ratios = torch.stack([(x - x.detach() - 0.1).mean().exp() for x in (first, second)])
    return -(ratios * torch.tensor([1.0, -2.0], dtype=ratios.dtype)).sum()


def entropy_alone(found: TokenLogprobs) -> torch.Tensor:
    """A loss that the log-probs have no part in."""
    return -found.entropy_N.square().sum()


def both(found: TokenLogprobs) -> torch.Tensor:
    """Log-prob and entropy in one product."""
    return (found.logprob_N * found.entropy_N).sum()


LOSSES = {loss.__name__: loss for loss in (ppo, gspo, entropy_alone, both)}


def gradients(function: Any, loss: Any, trained: tuple[str, ...], **keywords: Any) -> list[Any]:
    """Of hidden states and whatever of the head trains, in float64, with a row ignored."""
    generator = torch.Generator().manual_seed(5)
    inputs = make_hidden(SHAPE, F64, 0)
    inputs["token_N"][3] = -100
    sizes = {"bias": (67,), "A": (2, 16), "B": (67, 2)}
    parts = {k: torch.randn(*s, generator=generator, dtype=F64) for k, s in sizes.items()}
    leaves = [inputs["hidden_ND"], *(parts[name] for name in trained)]
    for leaf in leaves:
        leaf.requires_grad_()
    found = function(
        **inputs,
        bias_V=parts["bias"],
        head_lora=HeadLora(parts["A"], parts["B"], 0.7),
        softcap=5.0,
        temperature=torch.linspace(0.5, 2, 13, dtype=F64),
        entropy_grad=loss not in (ppo, gspo),
        **keywords,
    )
    loss(found).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("chunk_bytes", [None, 5 * 67 * 8])
@pytest.mark.parametrize("trained", TRAINED, ids="+".join)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_any_loss_are_the_definitions(name, trained, chunk_bytes):
    loss = LOSSES[name]
    want = gradients(linear_token_logprobs_reference, loss, trained)
    got = gradients(linear_token_logprobs, loss, trained, chunk_bytes=chunk_bytes)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", [OPS["linear_token_logprobs"], WITH_ENTROPY], ids=("J", "both"))
@interpreted(lambda op, dtype: (op is WITH_ENTROPY) == (dtype is torch.bfloat16))
def test_slopes_obey_the_oracles_rule(op, dtype, backend):
    check(op, op.make_inputs(SHAPE, dtype, 1), backend)


def test_float16_under_a_loss_scaler_keeps_small_gradients(backend):
    """The slope is of order 1 whatever the loss: the scaled g times it is rounded once."""
    inputs = place(make_hidden(SHAPE, torch.float16, 2), backend)
    inputs["hidden_ND"].requires_grad_()
    scale, weight = 2.0**14, 1e-6
    found = linear_token_logprobs(**inputs, backend=backend, logits_dtype=torch.float32)
    (found.logprob_N.sum() * weight * scale).backward()
    got = inputs["hidden_ND"].grad.cpu().double() / scale
    exact = {k: v.cpu().double() if v.is_floating_point() else v.cpu() for k, v in inputs.items()}
    exact["hidden_ND"] = exact["hidden_ND"].detach().requires_grad_()
    (linear_token_logprobs_reference(**exact).logprob_N.sum() * weight).backward()
    torch.testing.assert_close(got, exact["hidden_ND"].grad, atol=weight * 4e-3, rtol=4e-3)
    unscaled = (exact["hidden_ND"].grad).half().double()
    assert (got - exact["hidden_ND"].grad).norm() < (unscaled - exact["hidden_ND"].grad).norm()


def test_without_entropy_grad_the_entropy_is_detached():
    inputs = make_hidden(SHAPE, F64, 0)
    for leaf in ("hidden_ND", "weight_VD"):  # also where the weight trains
        inputs[leaf].requires_grad_()
        found = linear_token_logprobs(**inputs)
        assert found.logprob_N.requires_grad
        assert not found.entropy_N.requires_grad


def test_a_second_backward_gives_the_same():
    inputs = make_hidden(SHAPE, F64, 0)
    inputs["hidden_ND"].requires_grad_()
    loss = linear_token_logprobs(**inputs).logprob_N.square().sum()
    first, second = (
        torch.autograd.grad(loss, inputs["hidden_ND"], retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_nothing_of_the_head_or_the_hidden_states_is_kept():
    inputs = make_hidden(SHAPE, torch.float32, 0)
    inputs["hidden_ND"].requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear_token_logprobs(**inputs)
    storages = {x.untyped_storage().data_ptr() for x in kept}
    assert inputs["hidden_ND"].untyped_storage().data_ptr() not in storages
    assert inputs["weight_VD"].untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_it_gives_the_same(reentrant):
    inputs = make_hidden(SHAPE, F64, 0)
    hidden, others = inputs.pop("hidden_ND"), inputs
    grads = []
    for wrap in (False, True):
        leaf = hidden.detach().requires_grad_()

        def call(x):
            return linear_token_logprobs(x * 2, **others).logprob_N

        logprob_N = checkpoint(call, leaf, use_reentrant=reentrant) if wrap else call(leaf)
        logprob_N.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("trained", "entropy_grad"),
    slow_unless(
        lambda trained, entropy_grad: entropy_grad == (len(trained) > 1) and trained != ("bias_V",),
        itertools.product([("hidden_ND",), ("hidden_ND", "bias_V"), ("bias_V",)], [False, True]),
    ),
    ids=str,
)
def test_compiled_whole_it_gives_the_same_gradients(trained, entropy_grad, traced):
    torch._dynamo.reset()

    def loss(hidden_ND, bias_V, weight_VD, token_N):
        found = linear_token_logprobs(
            hidden_ND,
            weight_VD,
            token_N,
            bias_V=bias_V,
            entropy_grad=entropy_grad,
            backend=traced,
        )
        return (found.logprob_N.exp() * (1 + found.entropy_N)).sum()

    grads = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = place(make_hidden(SHAPE, torch.float32, 3), traced)
        inputs["bias_V"] = torch.linspace(-1, 1, 67, device=inputs["hidden_ND"].device)
        for name in trained:
            inputs[name].requires_grad_()
        call(**inputs).backward()
        grads.append([inputs[name].grad for name in trained])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
