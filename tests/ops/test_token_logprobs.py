"""Log-prob and entropy: by hand, masked vocabulary, temperature, softcap, strides, errors."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo.ops import token_logprobs
from tests.ops.references import token_logprobs_reference

INF = float("inf")


def t(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def test_three_logits_by_hand():
    # p = 1/6, 2/6, 3/6; H = -(1/6 ln 1/6 + 1/3 ln 1/3 + 1/2 ln 1/2)
    logits = t([[math.log(1), math.log(2), math.log(3)]])
    got = token_logprobs(logits, torch.tensor([2]))
    assert got.logprob_N.item() == pytest.approx(math.log(1 / 2), abs=1e-12)
    entropy = math.log(6) / 6 + math.log(3) / 3 + math.log(2) / 2
    assert got.entropy_N.item() == pytest.approx(entropy, abs=1e-12)


def test_temperature_divides_and_softcap_bends_before_it():
    logits, token = t([[4.0, -2.0, 0.0]]), torch.tensor([0])
    z = 3 * torch.tanh(logits / 3) / 0.5
    got = token_logprobs(logits, token, temperature=0.5, softcap=3.0).logprob_N
    torch.testing.assert_close(got, z.log_softmax(-1)[:, 0])


def test_a_temperature_a_token():
    logits = torch.randn(4, 9, dtype=torch.float64)
    token, tau = torch.tensor([0, 3, 5, 8]), t([0.5, 1.0, 1.5, 2.0])
    got = token_logprobs(logits, token, temperature=tau)
    for i in range(4):
        one = token_logprobs(logits[i : i + 1], token[i : i + 1], temperature=tau[i].item())
        torch.testing.assert_close(got.logprob_N[i : i + 1], one.logprob_N)
    zero_d = token_logprobs(logits, token, temperature=t(0.5)).logprob_N
    assert torch.equal(zero_d, token_logprobs(logits, token, temperature=0.5).logprob_N)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_masked_vocabulary_is_as_if_it_were_not_there(softcap, temperature):
    logits = torch.randn(3, 6, dtype=torch.float64)
    wide = torch.cat([logits, torch.full((3, 4), -INF, dtype=torch.float64)], 1)
    wide.requires_grad_()
    token = torch.tensor([0, 2, 5])
    settings = {"temperature": temperature, "softcap": softcap}
    got, want = token_logprobs(wide, token, **settings), token_logprobs(logits, token, **settings)
    torch.testing.assert_close(got.logprob_N, want.logprob_N)
    torch.testing.assert_close(got.entropy_N, want.entropy_N)
    (got.logprob_N.sum() + got.entropy_N.sum()).backward()
    assert torch.isfinite(wide.grad).all()
    assert not wide.grad[:, 6:].any()


def test_a_masked_sample_has_log_prob_minus_inf_and_no_gradient():
    logits = t([[0.0, -INF, 1.0]]).requires_grad_()
    got = token_logprobs(logits, torch.tensor([1]))
    assert got.logprob_N.item() == -INF
    got.logprob_N.sum().backward()
    assert not logits.grad.any()


def test_a_row_of_nothing_but_masked_vocabulary_is_not_nan():
    got = token_logprobs(torch.full((1, 3), -INF), torch.tensor([0]))
    assert got.logprob_N.item() == -INF
    assert got.entropy_N.item() == 0.0


def test_ignored_rows_are_0_and_their_nans_do_not_leak():
    logits = torch.randn(3, 5)
    logits[1] = float("nan")
    logits.requires_grad_()
    got = token_logprobs(logits, torch.tensor([1, -100, 2]))
    assert got.logprob_N[1] == got.entropy_N[1] == 0
    (got.logprob_N.sum() + got.entropy_N.sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[1].any()


def test_huge_logits_stay_finite():
    logits = torch.tensor([[1e30, -1e30, 0.0], [3e4, 3e4, -3e4]])
    got = token_logprobs(logits, torch.tensor([0, 1]))
    assert got.logprob_N.tolist() == pytest.approx([0.0, -math.log(2)])
    assert got.entropy_N.tolist() == pytest.approx([0.0, math.log(2)])


@pytest.mark.parametrize(("n", "vocab"), [(2, 2**17 + 3), (2**16 + 1, 3)])
def test_vocabularies_past_2_17_and_tokens_past_2_16(n, vocab):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, vocab, generator=generator)
    token = torch.randint(vocab, (n,), generator=generator)
    token[-1] = vocab - 1
    got, want = token_logprobs(logits, token), token_logprobs_reference(logits.double(), token)
    torch.testing.assert_close(got.logprob_N.double(), want.logprob_N, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.entropy_N.double(), want.entropy_N, atol=1e-4, rtol=0)


def test_any_strides_give_the_same():
    base = torch.randn(12, 22)
    token = torch.tensor([0, 3, 7, 10])
    for view in (base[::3, :11], base[:4, 3:14], base[:4, ::2], base.T[:4, :11]):
        packed = token_logprobs(view.contiguous(), token)
        assert torch.equal(token_logprobs(view, token).logprob_N, packed.logprob_N)


def test_the_gradient_of_a_view_reaches_its_base():
    base = torch.randn(4, 22, dtype=torch.float64, requires_grad=True)
    token = torch.tensor([0, 3, 7, 10])
    token_logprobs(base[:, ::2], token).logprob_N.sum().backward()
    assert not base.grad[:, 1::2].any()
    assert base.grad[:, ::2].any()


def test_int32_tokens_do():
    logits = torch.randn(2, 5)
    one, other = (
        token_logprobs(logits, torch.tensor([1, 4], dtype=d)) for d in (torch.int32, torch.int64)
    )
    assert torch.equal(one.logprob_N, other.logprob_N)


@pytest.mark.parametrize("output", ["logprob_N", "entropy_N"])
def test_each_output_alone_has_its_gradient(output):
    logits, token = torch.randn(3, 7, dtype=torch.float64), torch.tensor([1, -100, 6])
    grads = []
    for function in (token_logprobs, token_logprobs_reference):
        x = logits.clone().requires_grad_()
        getattr(function(x, token), output).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, atol=1e-12, rtol=0)


def test_double_backward_is_refused():
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    lp = token_logprobs(logits, torch.tensor([0, 1])).logprob_N.square().sum()
    (grad,) = torch.autograd.grad(lp, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"logits_NV": torch.zeros(2, 3, 4)},
            ValueError,
            r"token_N must have shape \(2, 3\), one entry a row, came \(2,\)",
        ),
        (
            {"logits_NV": torch.zeros(2, 3).long()},
            TypeError,
            "logits_NV must hold floats, came torch.int64",
        ),
        ({"logits_NV": torch.zeros(2, 0)}, ValueError, "vocabulary is empty"),
        ({"token_N": torch.zeros(2)}, TypeError, "token_N must be int64"),
        (
            {"token_N": torch.zeros(3).long()},
            ValueError,
            r"token_N must have shape \(2,\).*came \(3,\)",
        ),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, came 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must have shape \(2,\)"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive or None"),
        (
            {"token_N": torch.tensor([0, 3]), "check": True},
            ValueError,
            r"lie in \[0, 3\).*came 3 at 1",
        ),
    ],
)
def test_refusals_name_op_argument_wanted_and_came(change, error, message):
    inputs = {"logits_NV": torch.zeros(2, 3), "token_N": torch.tensor([0, 1]), **change}
    with pytest.raises(error, match="^token_logprobs: .*" + message):
        token_logprobs(**inputs)
