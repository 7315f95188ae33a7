"""Log-probs from hidden states: gradients of the whole head, and logits a chunk at a time."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import HeadLora, linear_token_logprobs, token_logprobs
from tests.ops.references import linear_token_logprobs_reference
from tests.ops.registry import Shape, make_hidden

F64 = torch.float64


@pytest.mark.parametrize("chunk_bytes", [None, 1, 3000])
def test_gradients_of_hidden_states_weight_bias_and_adapter(chunk_bytes):
    grads = []
    for function in (linear_token_logprobs, linear_token_logprobs_reference):
        generator = torch.Generator().manual_seed(3)
        inputs = make_hidden(Shape(n=11, vocab=53, hidden=7), F64, 0)
        a, b, bias = (
            torch.randn(*s, generator=generator, dtype=F64) for s in ((2, 7), (53, 2), (53,))
        )
        leaves = [inputs["hidden_ND"], inputs["weight_VD"], bias, a, b]
        for leaf in leaves:
            leaf.requires_grad_()
        extra = {"chunk_bytes": chunk_bytes} if function is linear_token_logprobs else {}
        extra |= {"head_lora": HeadLora(a, b, 0.7), "softcap": 5.0, "entropy_grad": True}
        out = function(**inputs, bias_V=bias, **extra)
        (out.logprob_N.square().sum() + out.entropy_N.sum()).backward()
        grads.append([leaf.grad for leaf in leaves])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)


def test_ignored_rows_are_0():
    inputs = make_hidden(Shape(n=3, vocab=5, hidden=4), torch.float32, 0)
    inputs["token_N"][1] = -100
    got = linear_token_logprobs(**inputs)
    assert got.logprob_N[1] == got.entropy_N[1] == 0
    assert (got.logprob_N[[0, 2]] < 0).all()


@pytest.mark.parametrize("function", [linear_token_logprobs, linear_token_logprobs_reference])
def test_gradcheck_of_everything_that_may_train(function):
    generator = torch.Generator().manual_seed(4)
    inputs = make_hidden(Shape(n=3, vocab=5, hidden=4), F64, 0)
    shapes = ((5,), (2, 4), (5, 2))
    bias, a, b = (torch.randn(*s, generator=generator, dtype=F64) for s in shapes)
    leaves = [x.requires_grad_() for x in (inputs["hidden_ND"], inputs["weight_VD"], bias, a, b)]

    def of(hidden, weight, bias, a, b):
        lora = HeadLora(a, b, 0.7)
        extra = {"head_lora": lora, "softcap": 5.0, "entropy_grad": True}
        return function(hidden, weight, inputs["token_N"], bias_V=bias, **extra)[:2]

    assert torch.autograd.gradcheck(of, leaves)


def test_nans_of_ignored_rows_do_not_leak_into_a_trained_head():
    grads = []
    for poison in (0.0, float("nan")):
        inputs = make_hidden(Shape(n=6, vocab=11, hidden=4), F64, 0)
        inputs["token_N"][2] = -100
        inputs["hidden_ND"][2] = poison
        leaves = [inputs["hidden_ND"], inputs["weight_VD"]]
        for leaf in leaves:
            leaf.requires_grad_()
        out = linear_token_logprobs(**inputs, entropy_grad=True)
        (out.logprob_N.sum() + out.entropy_N.sum()).backward()
        grads.append([leaf.grad for leaf in leaves])
    for clean, poisoned in zip(*grads, strict=True):
        assert torch.equal(clean, poisoned)
    assert not grads[1][0][2].any()


def test_a_bias_of_minus_inf_masks_vocabulary():
    inputs = make_hidden(Shape(n=6, vocab=11, hidden=4), F64, 0)
    inputs["token_N"] %= 8
    bias = torch.zeros(11, dtype=F64)
    bias[8:] = -float("inf")
    inputs["hidden_ND"].requires_grad_()
    got = linear_token_logprobs(**inputs, bias_V=bias, temperature=0.7)
    logits = inputs["hidden_ND"].detach() @ inputs["weight_VD"][:8].T
    want = token_logprobs(logits, inputs["token_N"], temperature=0.7)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    got.logprob_N.sum().backward()
    assert torch.isfinite(inputs["hidden_ND"].grad).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_ND": torch.zeros(3, 2)}, ValueError, "hidden_ND must have 4 columns.*came 2"),
        ({"weight_VD": torch.zeros(5, 4, dtype=F64)}, TypeError, "must have one dtype, came"),
        ({"token_N": torch.zeros(2).long()}, ValueError, r"token_N must have shape \(3,\).*\(2,\)"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, came 0.0"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive or None, came 0.0"),
    ],
)
def test_refusals_name_op_argument_wanted_and_came(change, error, message):
    inputs = make_hidden(Shape(n=3, vocab=5, hidden=4), torch.float32, 0)
    with pytest.raises(error, match="^linear_token_logprobs: .*" + message):
        linear_token_logprobs(**{**inputs, **change})
