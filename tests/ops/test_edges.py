"""Every op x backend x edge, from the registry, by the oracle's rule.

The native kernels are a backend for each vector width that the processor has; in the fast tier the
widest one runs every test, and the others what is marked `every_width`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo.ops import PolicyLossConfig, workspace
from tests.ops.oracle import check, few, place, run
from tests.ops.registry import OPS, Op, Shape
from tests.tiers import interpreted, slow_unless

pytestmark = pytest.mark.usefixtures("poisoned", "width")

Inputs = dict[str, Any]
SMALL = Shape(n=7, vocab=37, hidden=5, batch=3)
EVERY = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


ROWS = [op for op in OPS.values() if "token_N" in op.make_inputs(SMALL, torch.float32, 0)]
DENSE = [op for op in ROWS if not op.name.startswith("linear")]
OF_ROWS = pytest.mark.parametrize("op", ROWS, ids=lambda op: op.name)
OF_DENSE = pytest.mark.parametrize("op", DENSE, ids=lambda op: op.name)
# From hidden states a kernel is given chunks of logits, which are logits like any others.
INTERPRETED_DENSE = interpreted(lambda op: op in DENSE)


def logits_of(inputs: Inputs) -> list[str]:
    return [name for name in inputs if name.endswith("logits_NV")]


def edit(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with their logits changed."""
    return {**inputs, **{name: change(inputs[name].clone()) for name in logits_of(inputs)}}


SHAPES = [
    Shape(n=1, vocab=1, hidden=1, batch=1),
    Shape(n=5, vocab=1, hidden=3, batch=2),
    Shape(n=1, vocab=37, hidden=11, batch=1),
    Shape(n=13, vocab=1024, hidden=11, batch=4),  # one tile, whole
    Shape(n=64, vocab=1031, hidden=48, batch=7),  # a tile and 7
    Shape(n=6, vocab=8209, hidden=8, batch=2),  # several tiles of every table entry, and 17
]


def one_of_16_bits(op: Op, dtype: torch.dtype) -> bool:
    """float16 through a head, whose logits leave its range first; bfloat16 elsewhere."""
    wanted = torch.float16 if op.name.startswith("linear") else torch.bfloat16
    return dtype in (torch.float32, wanted)


def most_of_a_kernel(op: Op, dtype: torch.dtype) -> bool:
    """Each kernel in float32, the loss in bfloat16 and through a head too."""
    if op.name.startswith("linear"):
        return op.name == "linear_policy_loss" and dtype is torch.float16
    return dtype is torch.float32 or op.name == "policy_loss"


@pytest.mark.every_width
@interpreted(most_of_a_kernel)
@pytest.mark.parametrize(
    ("op", "dtype"),
    slow_unless(one_of_16_bits, product(OPS.values(), FLOATS)),
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_38_shapes_and_dtypes(op, dtype, backend):
    """All shapes in one test: starting a test takes longer than most of these calls."""
    for shape in SHAPES:
        print(shape)  # shown if the call fails
        workspace.release()  # what is left of the last call is poison, as at a test's start
        check(op, op.make_inputs(replace(shape, n=few(shape.n, backend, 5)), dtype, 1), backend)


@OF_DENSE
def test_a_vocabulary_past_2_to_the_17(op, backend):
    check(op, op.make_inputs(Shape(n=2, vocab=(1 << 17) + 5), torch.bfloat16, 2), backend)


@EVERY
def test_no_tokens(op, backend):
    inputs = op.make_inputs(Shape(n=0, vocab=5, hidden=3, batch=0), torch.float32, 0)
    values, grads = run(op, op.function, place(inputs, backend), backend=backend)
    assert all(x.numel() == 0 or x.item() == 0 for x in values)
    assert all(x.shape[0] == 0 for x in grads)


@OF_DENSE
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mask", [float("-inf"), -1e35], ids=["-inf", "low"])
@interpreted(lambda mask, dtype: dtype is (torch.float32 if mask < -1e36 else torch.bfloat16))
def test_masked_vocabulary(op, dtype, mask, backend):
    """-inf, or what some put in its place: nothing of it is left in sums or gradients."""
    inputs = op.make_inputs(SMALL, dtype, 3)
    low = mask if mask == float("-inf") else max(mask, torch.finfo(dtype).min)
    masked = torch.arange(SMALL.vocab) % 3 == 0
    masked[inputs["token_N"]] = False

    def change(x: Tensor) -> Tensor:
        x[:, masked] = low
        x[2, :30] = low  # lanes that see nothing else for a while
        x[2, inputs["token_N"][2]] = 0.5
        return x

    check(op, edit(inputs, change), backend)


@OF_DENSE
def test_a_sampled_token_of_masked_vocabulary(op, backend):
    """Log-prob -inf, ratio 0, no gradient, and counted."""
    inputs = op.make_inputs(SMALL, torch.float32, 4)

    def change(x: Tensor) -> Tensor:
        x[3, inputs["token_N"][3]] = float("-inf")
        return x

    masked = edit(inputs, change)
    check(op, masked, backend)
    values, grads = run(op, op.function, place(masked, backend), backend=backend)
    assert any(x.ndim and x[3] == float("-inf") for x in values)
    if op.loss:
        assert not grads[0][3].any()


@OF_DENSE
def test_a_row_of_nothing_but_masked_vocabulary_is_no_nan(op, backend):
    inputs = op.make_inputs(SMALL, torch.float32, 5)

    def change(x: Tensor) -> Tensor:
        x[1] = float("-inf")
        return x

    values, grads = run(op, op.function, place(edit(inputs, change), backend), backend=backend)
    assert not any(x.isnan().any() for x in (*values, *grads))
    assert all(not x[1].any() for x in grads)


@OF_ROWS
@INTERPRETED_DENSE
def test_ignored_rows_are_not_read(op, backend):
    """NaN in them does not leak; they give 0 and no gradient."""
    inputs = op.make_inputs(SMALL, torch.float32, 6)
    inputs["token_N"][[0, 4]] = -100
    poison = {name: inputs[name].clone() for name in inputs if name.endswith(("s_NV", "hidden_ND"))}
    clean = place(inputs, backend)
    want = run(op, op.function, clean, backend=backend)
    for x in poison.values():
        x[[0, 4]] = float("nan")
    got = run(op, op.function, place({**inputs, **poison}, backend), backend=backend)
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert torch.equal(a, b)
        assert a.ndim == 0 or not a[[0, 4]].any()


@pytest.mark.parametrize("name", ["policy_loss", "linear_policy_loss"])
@interpreted(lambda name: name == "policy_loss")
def test_rows_of_weight_0_are_not_read(name, backend):
    op = OPS[name]
    inputs = op.make_inputs(SMALL, torch.float32, 7)
    inputs["weight_N"][[1, 5]] = 0
    want = run(op, op.function, place(inputs, backend), backend=backend)
    for x in inputs.values():
        if isinstance(x, Tensor) and x.is_floating_point() and x.shape[:1] == (SMALL.n,):
            x[[1, 5]] = float("nan")
    inputs["weight_N"][[1, 5]] = 0
    got = run(op, op.function, place(inputs, backend), backend=backend)
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert torch.equal(a, b)
        assert not a.isnan().any()


@OF_DENSE
@pytest.mark.parametrize("how", ["columns", "rows", "transposed"])
@interpreted(lambda how: how == "columns")
def test_strides_change_no_bit(op, how, backend):
    """Triton's kernels load 16 bytes at once: rows of 40 that begin at another address differ by
    rounding (test_placement.py), and a row that begins 16 bytes on does not."""
    inputs = place(op.make_inputs(replace(SMALL, vocab=40), torch.float32, 8), backend)
    first = 4 if backend == "triton" else 1
    want = run(op, op.function, inputs, backend=backend)

    def change(x: Tensor) -> Tensor:
        n, vocab = x.shape
        if how == "transposed":
            return x.T.contiguous().T
        wide = torch.full((2 * n, vocab + 8), float("nan"), dtype=x.dtype, device=x.device)
        view = wide[:n, first : vocab + first] if how == "columns" else wide[::2, :vocab]
        return view.copy_(x)

    got = run(op, op.function, edit(inputs, change), backend=backend)
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert torch.equal(a, b)


@OF_ROWS
@INTERPRETED_DENSE
@pytest.mark.parametrize(
    ("softcap", "kind"),
    slow_unless(
        lambda softcap, kind: (softcap is None) == (kind == "float"),
        product([None, 4.0], ["float", "0-d", "a token"]),
    ),
)
def test_temperature_and_softcap(op, kind, softcap, backend):
    tau = torch.linspace(0.8, 1.2, SMALL.n)
    value = {"float": 0.8, "0-d": torch.tensor(0.8), "a token": tau}[kind]
    inputs = op.make_inputs(SMALL, torch.float32, 9)
    check(op, {**inputs, "temperature": value, "softcap": softcap}, backend)


SETTINGS: dict[str, Inputs] = {
    "plain": {"kl_coef": 0.0, "entropy_coef": 0.0, "ref_logprob_N": None},
    "wide clip": {"config": PolicyLossConfig(clip_low=0.1, clip_high=0.4)},
    "dual clip": {"config": PolicyLossConfig(dual_clip=1.5)},
    "k1": {"config": PolicyLossConfig(kl_kind="k1")},
    "abs": {"config": PolicyLossConfig(kl_kind="abs")},
    "k2": {"config": PolicyLossConfig(kl_kind="k2")},
    "tight limit": {"config": PolicyLossConfig(log_ratio_limit=0.2)},
    "no entropy": {"entropy_coef": 0.0},
    "on the device": {"kl_coef": torch.tensor(0.3), "entropy_coef": torch.tensor(0.02)},
    "by sequence": {
        "config": PolicyLossConfig(ratio_level="sequence"),
        "offsets": torch.tensor([0, 3, 3, 7], dtype=torch.int32),
    },
}


@pytest.mark.parametrize("setting", SETTINGS)
@interpreted(lambda name: name == "policy_loss")
@pytest.mark.parametrize(
    ("name", "dtype"),
    slow_unless(
        lambda name, dtype: (name == "policy_loss") == (dtype is torch.bfloat16),
        product(["policy_loss", "linear_policy_loss"], [torch.float32, torch.bfloat16]),
    ),
    ids=str,
)
def test_every_setting_of_the_loss(name, setting, dtype, backend):
    op = OPS[name]
    inputs = {**op.make_inputs(SMALL, dtype, 10), **SETTINGS[setting]}
    inputs["importance_weight_N"] = torch.linspace(0.5, 2, SMALL.n)
    check(op, inputs, backend)


@pytest.mark.parametrize("setting", SETTINGS)
def test_metrics_are_those_of_the_definition(setting, fused):
    """To float32's rounding, and counts to the unit."""
    op = OPS["policy_loss"]
    inputs = {**op.make_inputs(SMALL, torch.float32, 11), **SETTINGS[setting]}
    inputs["weight_N"][2] = 0
    inputs["logits_NV"][5, inputs["token_N"][5]] = float("-inf")
    with torch.no_grad():
        want = op.function(**inputs, backend="torch").metrics
        got = op.function(**place(inputs, fused), backend=fused).metrics
    for field, a, b in zip(want._fields, got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=2e-6, rtol=2e-6, msg=field)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab", [37, 4113])
@interpreted(lambda dtype, vocab: dtype is (torch.bfloat16 if vocab == 37 else torch.float32))
def test_in_place_is_the_same_to_the_bit(dtype, vocab, backend):
    op = OPS["policy_loss"]
    inputs = place(op.make_inputs(Shape(n=5, vocab=vocab), dtype, 12), backend)
    found = []
    for inplace in (False, True):
        leaf = inputs["logits_NV"].clone().requires_grad_()
        result = op.function(
            **{**inputs, "logits_NV": leaf * 1.0}, inplace=inplace, backend=backend
        )
        (3 * result.loss).backward()
        found.append((leaf.grad, *result[:4], *result.metrics))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["policy_loss", "linear_policy_loss"])
@pytest.mark.parametrize("on_device", [False, True])
@interpreted(lambda name: name == "policy_loss")
def test_grad_scale_and_grad_output_cancel(name, on_device, backend):
    op = OPS[name]
    inputs = place(op.make_inputs(SMALL, torch.float32, 13), backend)
    (leaf,) = op.differentiable
    grads = []
    for scale in (1.0, 1024.0):
        x = inputs[leaf].clone().requires_grad_()
        asked = torch.tensor(scale, device=x.device) if on_device else scale
        result = op.function(**{**inputs, leaf: x}, grad_scale=asked, backend=backend)
        (scale * result.loss).backward()
        grads.append(x.grad / scale)
    torch.testing.assert_close(grads[0], grads[1], atol=0, rtol=1e-6)


@EVERY
@pytest.mark.every_width
@interpreted(lambda op: not op.name.startswith("linear"))
def test_the_same_bits_twice(op, backend):
    shape = Shape(n=few(33, backend, 4), vocab=1500, hidden=9, batch=4)
    inputs = place(op.make_inputs(shape, torch.float32, 14), backend)
    first, second = (run(op, op.function, inputs, backend=backend) for _ in range(2))
    pairs = zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("op", DENSE, ids=lambda op: op.name)
def test_a_tokens_result_does_not_depend_on_the_batch_around_it(op, backend):
    vocab = 504 if backend == "triton" else 501  # rows of whole vectors, or any
    inputs = place(op.make_inputs(Shape(n=4, vocab=vocab), torch.float32, 15), backend)
    together = run(op, op.function, inputs, even=True, backend=backend)
    for i in range(4):
        part = {
            k: x[i : i + 1] if isinstance(x, Tensor) and x.ndim else x for k, x in inputs.items()
        }
        alone = run(op, op.function, part, even=True, backend=backend)
        pairs = zip([*together[0], *together[1]], [*alone[0], *alone[1]], strict=True)
        assert all(torch.equal(a[i : i + 1], b) for a, b in pairs if a.ndim)


@pytest.mark.parametrize("op", [op for op in ROWS if op not in DENSE], ids=lambda op: op.name)
@interpreted(lambda op: op.name == "linear_policy_loss")
def test_the_batch_around_a_hidden_state_moves_its_result_by_rounding_alone(op, backend):
    """To the bit it is not: a library's GEMM adds a row up in an order that its rows decide."""
    n = few(65, backend, 9)
    shape = Shape(n=n, vocab=501, hidden=96)
    inputs = place(op.make_inputs(shape, torch.float32, 15), backend)
    together = run(op, op.function, inputs, even=True, backend=backend)
    for i in (0, n - 1):
        part = {
            k: x[i : i + 1] if isinstance(x, Tensor) and x.shape[:1] == (n,) else x
            for k, x in inputs.items()
        }
        alone = run(op, op.function, part, even=True, backend=backend)
        for a, b in zip([*together[0], *together[1]], [*alone[0], *alone[1]], strict=True):
            if a.ndim:
                torch.testing.assert_close(a[i : i + 1], b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 2500])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_scans_over_one_two_and_three_blocks(length, whiten_rewards, fused):
    """A carry from block to block, beside sequences of one token and of none."""
    op = OPS["advantages"]
    n = length + 1
    inputs = op.make_inputs(Shape(n=n, batch=3), torch.float32, 16)
    inputs["offsets"] = torch.tensor([0, 1, 1, n], dtype=torch.int32)
    inputs |= {
        "gamma": 0.99,
        "whiten_rewards": whiten_rewards,
        "bootstrap_value_B": torch.tensor([0.5, 0.2, -0.3]),
        "extra_reward_N": torch.linspace(-1, 1, n),
    }
    want = op.function(**inputs, backend="torch")
    got = op.function(**place(inputs, fused), backend=fused)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=2e-5, rtol=2e-5)


def test_every_kind_of_kl(backend):
    op = OPS["token_kl"]
    for kind in ("k1", "abs", "k2", "k3"):
        inputs = {**op.make_inputs(SMALL, torch.float32, 17), "kind": kind}
        inputs["logprob_N"][2] = float("-inf")
        inputs["ref_logprob_N"][3] = inputs["logprob_N"][3] + 1e-4  # where exp(e) - 1 - e cancels
        check(op, inputs, backend)


def test_a_token_that_is_no_word_shows(fused):
    """The definition's gather refuses it; a kernel does not wait to tell, and gives NaN."""
    op = OPS["policy_loss"]
    inputs = place(op.make_inputs(SMALL, torch.float32, 18), fused)
    inputs["token_N"][1] = SMALL.vocab
    with torch.no_grad():
        result = op.function(**inputs, backend=fused)
    assert result.logprob_N[1].isnan()
    assert result.loss.isnan()


def test_nan_logits_show(backend):
    op = OPS["policy_loss"]
    inputs = place(op.make_inputs(SMALL, torch.float32, 19), backend)
    inputs["logits_NV"][2, 5] = float("nan")
    with torch.no_grad():
        result = op.function(**inputs, backend=backend)
    assert result.loss.isnan()
    assert result.metrics.ratio_max.isnan()


@pytest.mark.parametrize("name", ["policy_loss", "linear_policy_loss"])
def test_a_second_backward_of_a_kernels_gradient_is_refused(name, fused):
    op = OPS[name]
    inputs = place(op.make_inputs(SMALL, torch.float32, 20), fused)
    (leaf,) = op.differentiable
    inputs[leaf] = inputs[leaf].requires_grad_()
    loss = op.function(**inputs, backend=fused).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=rf"^{name}: a second backward.*call {name} again"):
        loss.backward()
