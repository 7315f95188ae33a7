"""16-bit operands: log-probs within tolerance of float32, autocast, a loss scaler."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastppo.ops import HeadLora, linear_token_logprobs
from tests.ops.oracle import device_of, place
from tests.ops.registry import Shape, make_hidden

SHAPE = Shape(n=6, vocab=19, hidden=5)


def test_autocast_casts_operands_as_linear_does(backend):
    """Then log-probs are those of nn.Linear and log_softmax, and nearer to the exact ones."""
    device, generator = device_of(backend), torch.Generator().manual_seed(0)
    weight = torch.randn(37, 16, generator=generator) / 4
    bias = torch.randn(37, generator=generator) / 4
    hidden = torch.randn(2, 9, 16, generator=generator)
    token = torch.randint(37, (2, 9), generator=generator).to(device)
    low, up = torch.randn(2, 16, generator=generator), torch.randn(37, 2, generator=generator)
    for given in (hidden, hidden.bfloat16()):
        made = (given, weight, bias, low, up)
        leaves = [x.clone().to(device).requires_grad_() for x in made]
        h, w, b, a, c = leaves
        with torch.autocast(device, torch.bfloat16):  # F.linear is what nn.Linear calls
            logits = F.linear(h, w, b) + 0.5 * F.linear(F.linear(h, a), c)
            theirs = logits.log_softmax(-1).gather(-1, token[..., None])[..., 0]
            ours = linear_token_logprobs(
                h, w, token, bias_V=b, head_lora=HeadLora(a, c, 0.5), backend=backend
            ).logprob_N
        exact_h, exact_w, exact_b, exact_a, exact_c = (x.bfloat16().double() for x in leaves)
        logits = F.linear(exact_h, exact_w, exact_b)
        logits = logits + 0.5 * F.linear(F.linear(exact_h, exact_a), exact_c)
        exact = logits.log_softmax(-1).gather(-1, token[..., None])[..., 0].detach()
        own, other = ((x.detach() - exact).abs().max() for x in (ours, theirs))
        assert own <= other
        assert own < 0.05  # the adapter's inner activations are rounded, as theirs are
        their_grads = torch.autograd.grad(theirs.sum(), leaves)
        for leaf, mine, x in zip(
            leaves, torch.autograd.grad(ours.sum(), leaves), their_grads, strict=True
        ):
            assert mine.dtype == leaf.dtype
            torch.testing.assert_close(mine, x, atol=0.02 * float(x.abs().max()), rtol=0.05)


def test_without_autocast_two_dtypes_stay_an_error():
    inputs = make_hidden(SHAPE, torch.float32, 0)
    inputs["hidden_ND"] = inputs["hidden_ND"].bfloat16()
    with pytest.raises(TypeError, match=r"must have one dtype, .*torch.autocast"):
        linear_token_logprobs(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_token_logprobs(**inputs).logprob_N.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probs_of_16_bit_operands_are_within_verls_tolerance(dtype, backend):
    """1e-3 of float32 arithmetic on the same operands; 16-bit logits are not."""
    shape = Shape(n=8 if backend == "triton" else 32, vocab=2048, hidden=64)
    inputs = place(make_hidden(shape, dtype, 0), backend)
    inputs["weight_VD"] = inputs["weight_VD"] * 4
    wide = inputs["hidden_ND"].float() @ inputs["weight_VD"].float().T
    want = wide.log_softmax(-1).gather(1, inputs["token_N"][:, None])[:, 0]
    got = linear_token_logprobs(**inputs, backend=backend).logprob_N
    assert (got - want).abs().max() < 1e-3
    fast = linear_token_logprobs(**inputs, logits_dtype=dtype, backend=backend).logprob_N
    assert (fast - want).abs().max() > 1e-3


def test_a_loss_scale_past_float16_is_multiplied_before_the_cast(backend):
    """g alone is no float16; g times the slope is one, and comes back to the last place."""
    inputs = place(make_hidden(SHAPE, torch.float16, 2), backend)
    inputs["weight_VD"] = inputs["weight_VD"] / 64
    leaf = inputs["hidden_ND"].requires_grad_()
    logprob = linear_token_logprobs(**inputs, backend=backend).logprob_N
    (one,) = torch.autograd.grad(logprob.sum(), leaf, retain_graph=True)
    (scaled,) = torch.autograd.grad(2.0**17 * logprob.sum(), leaf)
    fits = one.float().abs() < 65504 / 2**17
    assert fits.any()
    assert torch.equal(scaled.float()[fits], one.float()[fits] * 2**17)
