"""Several labels a row, and the log-sum-exp: both from the statistics of one sweep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastppo.ops import token_logprobs
from tests.ops.oracle import place
from tests.ops.registry import OPS, Shape
from tests.tiers import interpreted

F64 = torch.float64
SHAPE = Shape(n=6, vocab=19, hidden=5)


def top_labels(shape: Shape, k: int) -> Tensor:
    """(N, K) labels, an ignored one, a row of none but ignored ones, and one word twice."""
    generator = torch.Generator().manual_seed(7)
    label = torch.randint(shape.vocab, (shape.n, k), generator=generator)
    label[0, 1], label[2], label[3, 0] = -100, -100, label[3, 1]
    return label


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_logprobs"])
@pytest.mark.parametrize("trained", [False, True])
@interpreted(lambda name, trained: not (trained or name.startswith("linear")))
def test_several_labels_a_row_are_gathered_from_one_softmax(name, softcap, trained, backend):
    op, label = OPS[name], top_labels(SHAPE, 3)
    dtype = F64 if backend == "torch" else torch.float32
    inputs = op.make_inputs(SHAPE, dtype, 5)
    leaves = [inputs[op.differentiable[0]]]
    if name.startswith("linear") and trained:
        leaves.append(inputs["weight_VD"])
    for leaf in leaves:
        leaf.requires_grad_()
    x = inputs["hidden_ND"] @ inputs["weight_VD"].T if "hidden_ND" in inputs else leaves[0]
    tau = torch.linspace(0.5, 2, SHAPE.n, dtype=dtype)
    z = (x if softcap is None else softcap * torch.tanh(x / softcap)) / tau[:, None]
    log_p = z.log_softmax(-1)
    want = log_p.gather(1, label.clamp(min=0)).masked_fill(label < 0, 0)
    entropy = -(log_p.exp() * log_p).sum(-1).masked_fill((label < 0).all(1), 0)
    weight = torch.linspace(-1, 2, want.numel(), dtype=dtype).view_as(want)
    want_grads = torch.autograd.grad((want * weight).sum() + entropy.square().sum(), leaves)

    device = place({"x": label}, backend)["x"].device
    given = place(inputs, backend) | {"token_N": label.to(device), "temperature": tau.to(device)}
    if name.startswith("linear"):
        given["entropy_grad"] = True
    got = op.function(**given, softcap=softcap, backend=backend)
    loss = (got.logprob_N * weight.to(device)).sum() + got.entropy_N.square().sum()
    got_grads = torch.autograd.grad(loss, leaves)
    close = {"atol": 1e-11, "rtol": 1e-11} if dtype == F64 else {"atol": 2e-6, "rtol": 2e-5}
    torch.testing.assert_close(got.logprob_N.cpu(), want, **close)
    torch.testing.assert_close(got.entropy_N.cpu(), entropy, **close)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a.cpu(), b, **close)


def test_one_label_in_a_column_is_the_label_alone(backend):
    inputs = place(OPS["token_logprobs"].make_inputs(SHAPE, torch.float32, 6), backend)
    alone = token_logprobs(**inputs, backend=backend)
    column = inputs | {"token_N": inputs["token_N"][:, None]}
    got = token_logprobs(**column, backend=backend)
    torch.testing.assert_close(got.logprob_N[:, 0], alone.logprob_N, atol=1e-6, rtol=1e-6)
    assert torch.equal(got.entropy_N, alone.entropy_N)


def test_a_label_of_masked_vocabulary_is_impossible_and_passes_no_gradient(backend):
    logits = torch.tensor([[0.0, float("-inf"), 1.0]], requires_grad=True)
    label = torch.tensor([[0, 1]])
    given = place({"logits_NV": logits, "token_N": label}, backend)
    got = token_logprobs(**given, backend=backend).logprob_N
    assert got[0, 1] == float("-inf")
    (grad,) = torch.autograd.grad(got.masked_fill(got.isinf(), 0).sum(), logits)
    p = torch.tensor([0.0, 1.0]).softmax(0)
    torch.testing.assert_close(grad[0], torch.stack([1 - p[0], torch.tensor(0.0), -p[1]]))


def test_a_label_that_is_no_word_makes_no_word_likelier(backend):
    logits = torch.tensor([[0.5, 2.0, 1.0]], requires_grad=True)
    given = place({"logits_NV": logits, "token_N": torch.tensor([[1, 7]])}, backend)
    got = token_logprobs(**given, backend=backend).logprob_N
    assert got[0, 1].isnan()
    (grad,) = torch.autograd.grad(got.sum(), logits)
    p = torch.tensor([0.5, 2.0, 1.0]).softmax(0)
    torch.testing.assert_close(grad[0], torch.tensor([0.0, 1.0, 0.0]) - 2 * p)


@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_logprobs"])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@interpreted(lambda name, labels, grad: labels == grad and not name.startswith("linear"))
def test_lse_is_the_normaliser_of_what_the_softmax_sees(name, labels, grad, backend):
    op = OPS[name]
    inputs = place(op.make_inputs(SHAPE, torch.float32, 7), backend)
    x = (
        inputs["hidden_ND"] @ inputs["weight_VD"].T
        if "hidden_ND" in inputs
        else inputs["logits_NV"]
    ).double()
    inputs["token_N"][1] = -100
    if labels:
        inputs["token_N"] = torch.stack([inputs["token_N"]] * 2, 1)
    if grad:
        inputs[op.differentiable[0]].requires_grad_()
    got = op.function(
        **inputs, temperature=0.7, softcap=4.0, logit_scale=0.5, return_lse=True, backend=backend
    )
    want = (4 * torch.tanh(0.5 * x / 4) / 0.7).logsumexp(-1).detach()
    want[1] = 0
    assert not got.lse_N.requires_grad
    assert got.logprob_N.requires_grad == grad
    torch.testing.assert_close(got.lse_N.double(), want, atol=2e-6, rtol=2e-6)
    assert op.function(**inputs, backend=backend).lse_N is None
