"""Shapes of other trainers' tensors: batches and masks in place of packing, padded heads."""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo.ops import (
    HeadLora,
    PolicyLossConfig,
    linear_policy_loss,
    linear_score_tokens,
    linear_token_logprobs,
    policy_loss,
    score_tokens,
    token_kl,
    token_logprobs,
    value_loss,
)
from tests.ops.oracle import place, run, tensors
from tests.ops.registry import OPS, Shape, make_hidden
from tests.tiers import interpreted, slow_unless

F64 = torch.float64
SHAPE = Shape(n=6, vocab=19, hidden=5)
MASKED = [op for op in OPS.values() if "mask" in inspect.signature(op.function).parameters]
EVERY_MASKED = pytest.mark.parametrize("op", MASKED, ids=lambda op: op.name)
ON_LOGITS = ("token_logprobs", "policy_loss", "score_tokens")
# From hidden states a kernel is given chunks of logits, which are logits like any others.
DENSE = interpreted(lambda op: not op.name.startswith("linear"))
# One entry a token, with whatever follows it.
BY_TOKEN = ("_N", "_NV", "_ND")


def by_token(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {k: x for k, x in inputs.items() if isinstance(x, Tensor) and k.endswith(BY_TOKEN)}


def in_batches(inputs: dict[str, Any], *lead: int) -> dict[str, Any]:
    """The inputs with the tokens in that shape."""
    return inputs | {k: x.reshape(*lead, *x.shape[1:]) for k, x in by_token(inputs).items()}


def time_first(x: Tensor) -> Tensor:
    """(B, T, ...) as time-major trainers keep it: no view of it is rows."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def part(x: Tensor) -> Tensor:
    """Cut out of a batch with more of everything, full of what must not be read."""
    wide = x.new_full([size + 2 for size in x.shape], float("nan") if x.is_floating_point() else 0)
    return wide[tuple(slice(1, size + 1) for size in x.shape)].copy_(x)


@EVERY_MASKED
@pytest.mark.parametrize("layout", [time_first, part], ids=lambda f: f.__name__)
@interpreted(lambda op, layout: layout is time_first and not op.name.startswith("linear"))
def test_where_a_batch_lies_changes_no_number(op, layout, backend):
    inputs = in_batches(place(op.make_inputs(SHAPE, torch.float32, 9), backend), 2, 3)
    inputs["mask"] = torch.arange(6, device=next(iter(by_token(inputs).values())).device) % 3 > 0
    inputs["mask"] = inputs["mask"].view(2, 3)
    moved = inputs | {k: layout(x) for k, x in by_token(inputs).items()}
    moved["mask"] = layout(inputs["mask"])
    want = run(op, op.function, inputs, backend=backend)
    got = run(op, op.function, moved, backend=backend)
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert torch.equal(a, b)


def test_every_operator_over_tokens_takes_a_mask():
    assert {op.name for op in MASKED} == set(OPS) - {"gae", "whiten", "advantages"}


@EVERY_MASKED
@pytest.mark.parametrize("lead", [(2, 3), pytest.param((1, 6), marks=pytest.mark.slow), (3, 1, 2)])
@interpreted(lambda op, lead: len(lead) == 3 and not op.name.startswith("linear"))
def test_a_batch_gives_what_its_rows_give_in_its_own_shape(op, lead, backend):
    inputs = place(op.make_inputs(SHAPE, torch.float32, 0), backend)
    values, grads = run(op, op.function, inputs, backend=backend)
    got, got_grads = run(op, op.function, in_batches(inputs, *lead), backend=backend)
    for a, b in zip(got, values, strict=True):
        assert a.shape == (lead if b.ndim else ())
        assert torch.equal(a.reshape(b.shape), b)
    for a, b in zip(got_grads, grads, strict=True):
        assert torch.equal(a.reshape(b.shape), b)


@pytest.mark.parametrize(
    "name",
    [op.name for op in MASKED if "token_N" in by_token(op.make_inputs(SHAPE, torch.float32, 0))],
)
def test_one_token_alone_has_no_shape(name, backend):
    op = OPS[name]
    inputs = place(op.make_inputs(Shape(n=1, vocab=19, hidden=5), torch.float32, 0), backend)
    want = run(op, op.function, inputs, backend=backend)[0]
    one = inputs | {k: x.squeeze(0) for k, x in by_token(inputs).items()}
    for a, b in zip(run(op, op.function, one, backend=backend)[0], want, strict=True):
        assert a.shape == ()
        assert a == b.squeeze()


@interpreted(lambda op, dtype: dtype is torch.bool and not op.name.startswith("linear"))
@pytest.mark.parametrize(
    ("op", "dtype"),
    slow_unless(
        lambda op, dtype: dtype is torch.bool or op.name == "policy_loss",
        product(MASKED, [torch.bool, torch.uint8, torch.int64]),
    ),
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_masked_batch_gives_what_its_packed_tokens_give(op, dtype, backend):
    """Dead tokens hold NaN in every argument, and tokens that are no words."""
    inputs = place(op.make_inputs(SHAPE, torch.float32, 0), backend)
    live = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    packed = inputs | {k: x[live.to(x.device)] for k, x in by_token(inputs).items()}
    values, grads = run(op, op.function, packed, even=True, backend=backend)
    poisoned = dict(inputs)
    for name, x in by_token(inputs).items():
        poisoned[name] = x.clone()
        poisoned[name][~live.to(x.device)] = float("nan") if x.is_floating_point() else 10**6
    mask = live.view(2, 3).to(dtype)
    mask = place({"mask": mask}, backend)["mask"]
    given = in_batches(poisoned, 2, 3) | {"mask": mask}
    got, got_grads = run(op, op.function, given, even=True, backend=backend)
    rounding = {"atol": 2e-6, "rtol": 2e-6}  # of a GEMM of other rows, and of sums
    for a, b in zip(got, values, strict=True):
        if b.ndim:
            torch.testing.assert_close(a.flatten()[live], b, **rounding)
            assert not a.flatten()[~live].any()
        else:
            torch.testing.assert_close(a, b, **rounding)
    for a, b in zip(got_grads, grads, strict=True):
        flat = a.reshape(6, *b.shape[1:])
        torch.testing.assert_close(flat[live], b, **rounding)
        assert not flat[~live].any()


def test_a_mask_holds_in_metrics_and_ratios_by_sequence(backend):
    inputs = place(OPS["policy_loss"].make_inputs(SHAPE, torch.float32, 1), backend)
    live = torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.bool, device=inputs["token_N"].device)
    config = PolicyLossConfig(ratio_level="sequence")
    packed = inputs | {k: x[live] for k, x in by_token(inputs).items()}
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32, device=live.device)
    want = policy_loss(**packed, config=config, offsets=offsets, backend=backend)
    # Each row of a batch is a sequence.
    batch = in_batches(inputs, 2, 3)
    got = policy_loss(**batch, config=config, mask=live.view(2, 3), backend=backend)
    torch.testing.assert_close(got.loss, want.loss)
    assert got.metrics.count == want.metrics.count == 3


def test_nothing_is_copied_where_rows_are_a_view():
    """A (B, T, V) tensor reaches the kernel in its own memory; a part of its positions cannot."""
    seen: list[Tensor] = []
    logits, token = torch.randn(2, 3, 7), torch.randint(7, (2, 3))

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is torch.ops.fastppo.token_logprobs.default:
                seen.append(args[0])
            return func(*args, **(kwargs or {}))

    with Watch():
        token_logprobs(logits, token)
        token_logprobs(logits[:, :-1], token[:, 1:])
    assert seen[0].data_ptr() == logits.data_ptr()
    assert seen[1].data_ptr() != logits.data_ptr()


@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_logprobs"])
def test_shifted_labels_of_all_positions_give_what_a_slice_gives(name, backend):
    op = OPS[name]
    inputs = place(op.make_inputs(SHAPE, torch.float32, 2), backend)
    inputs = in_batches(inputs, 2, 3)
    (leaf,) = op.differentiable
    token = inputs.pop("token_N")
    shifted = F.pad(token[:, 1:], (0, 1), value=-100)
    found = []
    for cut, labels in ((slice(None), shifted), (slice(-1), token[:, 1:])):
        x = inputs[leaf].detach().requires_grad_()
        given = inputs | {leaf: x[:, cut]}
        logprob = op.function(**given, token_N=labels, backend=backend).logprob_N
        logprob.square().sum().backward()
        found.append((logprob[:, :2], x.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)
    assert not found[0][1][:, -1].any()


# Padded heads.


@pytest.mark.parametrize("name", ["token_logprobs", "policy_loss", "score_tokens"])
def test_columns_past_vocab_size_are_no_tokens(name, backend):
    op = OPS[name]
    inputs = place(op.make_inputs(SHAPE, torch.float32, 3), backend)
    values, grads = run(op, op.function, inputs, backend=backend)
    wide = dict(inputs)
    for key in ("logits_NV", "ref_logits_NV"):
        if key in inputs:
            wide[key] = F.pad(inputs[key], (0, 5), value=50.0)
    got, got_grads = run(op, op.function, wide, vocab_size=19, backend=backend)
    # Rows lie elsewhere, and their address decides the order in which Triton's kernels add them up.
    limits = {"atol": 1e-6, "rtol": 2e-6} if backend == "triton" else {"atol": 0.0, "rtol": 0.0}
    for a, b in zip(got, values, strict=True):
        torch.testing.assert_close(a, b, **limits)
    for a, b in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(a[:, :19], b, **limits)
        assert not a[:, 19:].any()


@pytest.mark.parametrize("mode", ["frozen", "trained"])
@pytest.mark.parametrize("function", [linear_token_logprobs, linear_policy_loss])
@interpreted(lambda function, mode: function is linear_policy_loss and mode == "frozen")
def test_rows_of_a_padded_head_are_no_tokens_and_get_no_gradient(function, mode, backend):
    """Zero rows of a padded head take part in the softmax: five of them changed a loss by 2.5%."""
    op = OPS[function.__name__]
    inputs = place(op.make_inputs(SHAPE, torch.float32, 4), backend)
    device = inputs["token_N"].device
    bias, low = torch.linspace(-1, 1, 19, device=device), torch.ones(2, 5, device=device)
    up = torch.linspace(-1, 1, 38, device=device).view(19, 2)

    def grads(padding: int, **keywords: Any) -> list[Tensor]:
        given = dict(inputs)
        own = [inputs["hidden_ND"].clone(), F.pad(inputs["weight_VD"], (0, 0, 0, padding))]
        own += [F.pad(bias, (0, padding)), low.clone(), F.pad(up, (0, 0, 0, padding))]
        for leaf in own if mode == "trained" else own[:1]:
            leaf.requires_grad_()
        given |= {"hidden_ND": own[0], "weight_VD": own[1], "bias_V": own[2]}
        given["head_lora"] = HeadLora(own[3], own[4], 0.5)
        found = function(**given, backend=backend, **keywords)
        (found.loss if op.loss else found.logprob_N.sum()).backward()
        assert all(leaf.grad.shape == leaf.shape for leaf in own if leaf.requires_grad)
        return [found[0], *(leaf.grad for leaf in own if leaf.requires_grad)]

    for a, b in zip(grads(5, vocab_size=19), grads(0), strict=True):
        rows = a.shape[0] - b.shape[0] if a.ndim else 0
        torch.testing.assert_close(a[: b.shape[0]] if a.ndim else a, b, atol=1e-6, rtol=1e-6)
        assert not rows or not a[-rows:].any()
    assert not torch.allclose(grads(5)[0], grads(0)[0])


def test_a_padded_weight_is_not_copied():
    inputs = make_hidden(Shape(n=4, vocab=4096, hidden=256), torch.float32, 0)
    weight = inputs["weight_VD"]
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_token_logprobs(**inputs, vocab_size=4000)
    made = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert made < weight.numel() * 4 / 8


def test_scoring_takes_heads_of_two_paddings():
    inputs = OPS["linear_score_tokens"].make_inputs(SHAPE, F64, 0)
    want = linear_score_tokens(**inputs)
    weight = inputs["weight_VD"]
    padded = inputs | {
        "weight_VD": F.pad(weight, (0, 0, 0, 3)),
        "ref_weight_VD": F.pad(weight, (0, 0, 0, 5)),
    }
    for a, b in zip(linear_score_tokens(**padded, vocab_size=19), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("softcap", [pytest.param(None, marks=pytest.mark.slow), 3.0])
@EVERY_MASKED
@DENSE
def test_logit_scale_is_a_factor_before_the_softcap(op, softcap, backend):
    """As in transformers: logits = lm_head(h) * scale, then the cap, then the temperature."""
    if "logit_scale" not in inspect.signature(op.function).parameters:
        return
    inputs = place(op.make_inputs(SHAPE, torch.float32, 8), backend)
    scaled = dict(inputs)
    for key in ("logits_NV", "ref_logits_NV", "weight_VD"):
        if key in inputs:
            scaled[key] = inputs[key] * 0.25
    settings = {"softcap": softcap, "temperature": 0.8, "backend": backend}
    got = run(op, op.function, inputs, logit_scale=0.25, **settings)
    want = run(op, op.function, scaled, **settings)
    factor = 0.25 if "logits_NV" in inputs else 1
    for a, b in zip([*got[0], *got[1]], [*want[0], *(x * factor for x in want[1])], strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-5)


def test_whatever_a_result_is_it_keeps_its_fields():
    """Callers name them: the first two of log-probs, and all of a loss."""
    inputs = OPS["policy_loss"].make_inputs(SHAPE, torch.float32, 0)
    found = token_logprobs(inputs["logits_NV"], inputs["token_N"])
    assert found._fields == ("logprob_N", "entropy_N", "lse_N")
    assert len(tensors(found)) == 2
    assert (
        score_tokens(inputs["logits_NV"], inputs["logits_NV"], inputs["token_N"])
        .exact_kl_N.eq(0)
        .all()
    )
    kl = token_kl(torch.zeros(2, 2), torch.zeros(2, 2), mask=torch.ones(2, 2, dtype=torch.bool))
    assert kl.shape == (2, 2)
    value = torch.zeros(2, 2)
    assert value_loss(value, value, value, value).loss.shape == ()
