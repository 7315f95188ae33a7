"""The loss from hidden states: what trains, how many GEMMs, and that chunks do not matter."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import HeadLora, PolicyLossConfig, linear_policy_loss, policy_loss
from tests.ops.references import linear_policy_loss_reference
from tests.ops.registry import OPS, Shape

F64 = torch.float64
N, V, D = 24, 301, 16


def make(dtype=F64, n=N):
    return OPS["linear_policy_loss"].make_inputs(Shape(n=n, vocab=V, hidden=D, batch=3), dtype, 0)


def whole_head(trained):
    """Weight, bias and an adapter of rank 3; those named in `trained` ask for a gradient."""
    generator = torch.Generator().manual_seed(9)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64) * 0.3

    head = {
        "weight_VD": random(V, D),
        "bias_V": random(V),
        "A_RD": random(3, D),
        "B_VR": random(V, 3),
    }
    for name in trained:
        head[name].requires_grad_()
    return head


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "trained",
    [(), ("weight_VD",), ("A_RD", "B_VR"), ("weight_VD", "bias_V", "A_RD", "B_VR")],
    ids=str,
)
def test_what_trains_gets_its_gradient_and_what_does_not_gets_none(trained, level):
    changes = {
        "config": PolicyLossConfig(ratio_level=level, dual_clip=3.0),
        "offsets": torch.tensor([0, 1, 9, N], dtype=torch.int32),
        "softcap": 6.0,
        "temperature": 0.8,
    }
    grads = []
    for function in (linear_policy_loss, linear_policy_loss_reference):
        head = whole_head(trained)
        inputs = {**make(), **changes, "weight_VD": head["weight_VD"], "bias_V": head["bias_V"]}
        inputs["hidden_ND"] = inputs["hidden_ND"].clone().requires_grad_()
        inputs["head_lora"] = HeadLora(head["A_RD"], head["B_VR"], scaling=0.5)
        function(**inputs).loss.backward()
        grads.append([inputs["hidden_ND"].grad, *(head[name].grad for name in trained)])
        assert all(head[name].grad is None for name in head if name not in trained)
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("chunk_bytes", [1, 5 * V * 8, 10**9])
def test_chunks_change_nothing_but_rounding(chunk_bytes):
    results = []
    for budget in (None, chunk_bytes):
        inputs = make()
        inputs["hidden_ND"].requires_grad_()
        result = linear_policy_loss(**inputs, chunk_bytes=budget)
        result.loss.backward()
        results.append((result.loss, result.logprob_N, inputs["hidden_ND"].grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_it_is_the_loss_of_the_logits():
    inputs = make()
    want = policy_loss(
        inputs["hidden_ND"] @ inputs["weight_VD"].T,
        **{k: v for k, v in inputs.items() if k not in ("hidden_ND", "weight_VD")},
    )
    got = linear_policy_loss(**inputs)
    for a, b in zip(got[:4], want[:4], strict=True):
        torch.testing.assert_close(a, b)


def test_nans_behind_weight_0_do_not_leak_into_a_trained_head():
    grads = []
    for poison in (0.0, float("nan")):
        head = whole_head(("weight_VD", "bias_V", "A_RD", "B_VR"))
        inputs = {**make(), "weight_VD": head["weight_VD"], "bias_V": head["bias_V"]}
        inputs["head_lora"] = HeadLora(head["A_RD"], head["B_VR"], scaling=0.5)
        inputs["weight_N"][3] = 0
        inputs["hidden_ND"][3] = poison
        inputs["hidden_ND"].requires_grad_()
        linear_policy_loss(**inputs).loss.backward()
        grads.append([inputs["hidden_ND"].grad, *(x.grad for x in head.values())])
    for clean, poisoned in zip(*grads, strict=True):
        assert torch.equal(clean, poisoned)


def test_autocast_does_not_round_the_float32_logits_of_its_operands():
    inputs = make(torch.bfloat16)
    results = []
    for enabled in (False, True):
        hidden = inputs["hidden_ND"].detach().clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            result = linear_policy_loss(**{**inputs, "hidden_ND": hidden})
            result.loss.backward()
        results.append((result.loss, result.logprob_N, hidden.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_second_backward_with_retain_graph_adds_the_same_again():
    inputs = make()
    hidden = inputs["hidden_ND"].requires_grad_()
    loss = linear_policy_loss(**inputs).loss
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * first)


def test_float32_logits_of_bf16_operands_lose_nothing_to_rounding():
    inputs = make(torch.bfloat16)
    exact = linear_policy_loss(
        **{
            k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for k, x in inputs.items()
        }
    ).logprob_N
    kept = linear_policy_loss(**inputs).logprob_N
    rounded = linear_policy_loss(**inputs, logits_dtype=torch.bfloat16).logprob_N
    assert (kept - exact).abs().max() < 1e-5
    assert (rounded - exact).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight_VD": torch.zeros(V, 5, dtype=F64)}, ValueError, "hidden_ND must have 5 columns"),
        (
            {"logits_dtype": torch.bfloat16},
            ValueError,
            "logits_dtype must be .*came torch.bfloat16",
        ),
        ({"weight_VD": torch.zeros(V, D)}, TypeError, "must have one dtype.*cast one of them"),
        ({"bias_V": torch.zeros(3, dtype=F64)}, ValueError, rf"bias_V must have shape \({V},\)"),
        (
            {"head_lora": HeadLora(torch.zeros(3, D), torch.zeros(V, 4))},
            ValueError,
            r"head_lora must be A \(R, 16\) and B \(301, R\)",
        ),
    ],
)
def test_refusals_name_op_argument_wanted_and_came(change, error, message):
    with pytest.raises(error, match="^linear_policy_loss: .*" + message):
        linear_policy_loss(**{**make(), **change})


def test_a_masked_sample_in_a_row_passes_no_gradient_to_hidden_states_or_head():
    inputs = make()
    bias = torch.zeros(V, dtype=F64)
    bias[inputs["token_N"][3]] = -float("inf")
    hit = inputs["token_N"] == inputs["token_N"][3]
    inputs["hidden_ND"].requires_grad_()
    inputs["weight_VD"].requires_grad_()
    result = linear_policy_loss(**inputs, bias_V=bias, softcap=6.0, temperature=0.7)
    result.loss.backward()
    assert (result.logprob_N[hit] == -float("inf")).all()
    assert torch.isfinite(result.loss)
    assert not inputs["hidden_ND"].grad[hit].any()
    assert not inputs["weight_VD"].grad[inputs["token_N"][3]].any()
    assert torch.isfinite(inputs["weight_VD"].grad).all()
