"""What the ops from hidden states cost: GEMMs by the profiler, memory by the allocator's events."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.harness import allocations, peak_bytes
from fastppo.ops import rows
from fastppo.ops.backend import available
from fastppo.ops.losses import POLICY_LOSSES
from fastppo.ops.word_blocks import LEAST_TOKENS
from tests.ops.oracle import place, run
from tests.ops.registry import OPS, Shape, even_offsets
from tests.tiers import slow_unless

LINEAR = [op for op in OPS.values() if op.name.startswith("linear")]
# GEMMs of N x V x D. A frozen head needs the logits and d hidden, and of log-probs d hidden does
# not depend on the loss; the entropy's is one more. A trained bias or adapter takes its gradient
# from logits that are made again; a trained weight adds its own gradient. A loss by sequence is
# known after all log-probs only: with a frozen head the slope is made beside them. Logits that are
# kept in the memory of a trained weight's gradient are not made again.
GEMMS = {
    "linear_policy_loss": {
        "no_grad": 1,
        "frozen": 2,
        "trained": 3,
        "cispo no_grad": 1,
        "cispo frozen": 2,
        "cispo entropy": 2,
        "cispo bias": 2,
        "cispo trained": 3,
        "gspo no_grad": 1,
        "gspo frozen": 2,
        "gspo entropy": 3,
        "gspo bias": 3,
        "gspo trained": 4,
        "gspo_token frozen": 2,
        "gspo_token trained": 4,
        "own no_grad": 1,
        "own frozen": 2,
        "own trained": 3,
    },
    "linear_token_logprobs": {
        "no_grad": 1,
        "frozen": 2,
        "entropy": 3,
        "bias": 3,
        "bias alone": 2,
        "labels": 3,
        "labels, trained": 4,
        "trained": 4,
    },
    "linear_score_tokens": {"no_grad": 2},
}
KEPT = {
    "linear_policy_loss": {
        "trained": 3,
        "gspo trained": 3,
        "gspo_token trained": 3,
        "own trained": 3,
    },
    "linear_token_logprobs": {"frozen": 2, "bias": 3, "trained": 3, "labels, trained": 4},
}
# Chunks and GEMMs are made above the kernels: Triton's interpreter would add its minutes alone.
ON_CPU = [name for name in available("cpu") if name != "triton"]
HERE = [*ON_CPU, *(["triton"] if torch.cuda.is_available() else [])]
VOCAB = 4099
ROW = VOCAB * 4
BUDGET = 16 * ROW
SMALL = 6 * ROW + 32 * 64 * 4  # the definition's block of a row, vectors by the dozen
MODES = [(name, mode) for name, modes in GEMMS.items() for mode in modes]


# Two policies are scored side by side, and the logits' two gradients are made one after the other.
ONE_CHUNK = [(op, mode) for op, mode in MODES if op != "linear_score_tokens" and mode != "entropy"]


def of_a_kind(name, mode):
    """One mode for each way in which memory is taken."""
    if name == "linear_token_logprobs":
        return mode in ("frozen", "entropy", "trained")
    return " " not in mode or mode in ("gspo frozen", "gspo trained")


def step_of(name, mode, shape, backend, dtype=torch.float32, **keywords):
    """A call of the op in which that much trains, its inputs made outside.

    A mode may begin with a loss: its name, or "own" for a function.
    """
    op = OPS[name]
    inputs = place(op.make_inputs(shape, dtype, 0), backend)
    first = mode.split()[0]
    if first == "own" or first in POLICY_LOSSES:
        loss, mode = mode.split()
        own = -inputs["advantage_N"]
        inputs["loss"] = (lambda lp, h, at: own[at] * lp.exp() - h) if loss == "own" else loss
        inputs["offsets"] = even_offsets(shape).to(own.device)
        inputs["entropy_coef"] = 0.01 if mode == "entropy" else 0.0
    for leaf in op.differentiable:
        inputs[leaf] = inputs[leaf].requires_grad_(mode != "bias alone")
    inputs["weight_VD"].requires_grad_("trained" in mode)
    if mode.startswith("labels"):
        inputs["token_N"] = torch.stack([inputs["token_N"]] * 3, 1)
    if mode.startswith("bias"):
        inputs["bias_V"] = torch.zeros_like(inputs["weight_VD"][:, 0]).requires_grad_()
    if mode == "entropy" and not op.loss:
        inputs["entropy_grad"] = True

    def step():
        inputs["weight_VD"].grad = inputs["hidden_ND"].grad = None
        with torch.set_grad_enabled(mode != "no_grad"):
            result = op.function(**inputs, backend=backend, **keywords)
            if mode != "no_grad":
                loss = result.loss if op.loss else result.logprob_N.sum()
                both = mode == "entropy" and not op.loss
                (loss + result.entropy_N.sum() if both else loss).backward()

    return step


def test_every_op_from_hidden_states_has_its_costs_stated():
    assert set(GEMMS) == {op.name for op in LINEAR}


def flops_of(event):
    """Of a matrix product; the profiler knows the products in place by their shapes alone."""
    if event.name in ("aten::addmm_", "aten::baddbmm_"):
        *batch, rows, inner = event.input_shapes[1]
        return 2 * math.prod(batch) * rows * inner * event.input_shapes[2][-1]
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    return event.flops if event.name in products else 0


def gemms(name, mode, on, n, hidden=16):
    """GEMMs of N x V x D that a call with its gradient takes."""
    shape = Shape(n=n, vocab=67, hidden=hidden)
    step = step_of(name, mode, shape, on)
    # It sees inside custom ops, which FlopCounterMode does not.
    with torch.profiler.profile(with_flops=True, record_shapes=True) as profile:
        step()
    flops = sum(flops_of(event) for event in profile.events())
    return flops / (2 * shape.n * shape.vocab * shape.hidden)


@pytest.mark.parametrize(
    ("name", "mode", "on"),
    slow_unless(
        lambda name, mode, on: on != "torch" or of_a_kind(name, mode),
        [(*mode, on) for mode in MODES for on in HERE],
    ),
)
def test_it_costs_that_many_gemms_and_no_more(name, mode, on):
    assert gemms(name, mode, on, 24) == pytest.approx(GEMMS[name][mode], rel=0.01)


@pytest.mark.skipif("native" not in HERE, reason="needs the C++ kernels")
@pytest.mark.parametrize("mode", GEMMS["linear_token_logprobs"])
def test_by_blocks_of_words_it_costs_as_many(mode):
    found = gemms("linear_token_logprobs", mode, "native", LEAST_TOKENS)
    assert found == pytest.approx(GEMMS["linear_token_logprobs"][mode], rel=0.01)


@pytest.mark.skipif("native" not in HERE, reason="needs the C++ kernels")
@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in KEPT for mode in KEPT[name]])
def test_where_the_logits_fit_in_the_weights_gradient_they_are_made_once(name, mode):
    assert gemms(name, mode, "native", 64, 80) == pytest.approx(KEPT[name][mode], rel=0.01)


@pytest.mark.slow  # the fast tier has its least and its most, below
@pytest.mark.parametrize("on", ON_CPU)
@pytest.mark.parametrize(("name", "mode"), MODES)
def test_memory_does_not_grow_with_the_logits(name, mode, on, monkeypatch):
    few, many = (above(name, mode, on, n, monkeypatch) for n in (64, 128))
    assert many - few <= 64 * 32 * 4  # vectors by the dozen; one row of logits is more


@pytest.mark.parametrize(
    ("name", "mode", "on"),
    slow_unless(
        # The definition goes over blocks of a row, and takes ten times as long.
        lambda name, mode, on: (
            of_a_kind(name, mode) if on != "torch" else mode in ("trained", "gspo trained")
        ),
        [(*mode, on) for mode in ONE_CHUNK for on in ON_CPU],
    ),
)
def test_memory_above_inputs_and_outputs_is_one_chunk(name, mode, on, monkeypatch):
    assert BUDGET <= above(name, mode, on, 64, monkeypatch) <= BUDGET + SMALL


@pytest.mark.parametrize("on", ON_CPU)
@pytest.mark.parametrize("name", ["linear_policy_loss", "linear_token_logprobs"])
def test_a_16_bit_gradient_of_float32_logits_is_half_a_chunk_more(name, on, monkeypatch):
    """What the memory plan counts; and blocks of the upcast weight."""
    upcast = (1024 + 16) * 8 * 4
    # On a CPU with AMX, oneDNN lays out the matrices of 16-bit products anew, in memory of its own.
    with torch.backends.mkldnn.flags(enabled=False):
        peak = above(name, "frozen", on, 64, monkeypatch, torch.bfloat16)
    assert BUDGET * 3 // 2 <= peak <= BUDGET * 3 // 2 + SMALL + upcast


@pytest.mark.parametrize("on", ON_CPU)
def test_memory_with_the_entropys_gradient_is_two_chunks(on, monkeypatch):
    peak = above("linear_token_logprobs", "entropy", on, 64, monkeypatch)
    assert 2 * BUDGET <= peak <= 2 * (BUDGET + SMALL)


@pytest.mark.parametrize("on", ON_CPU)
def test_memory_of_scoring_is_one_chunk_a_policy(on, monkeypatch):
    peak = above("linear_score_tokens", "no_grad", on, 64, monkeypatch)
    assert 2 * BUDGET <= peak <= 2 * (BUDGET + SMALL)


def above(name, mode, on, n, monkeypatch, dtype=torch.float32):
    """Peak of the tensors above inputs and outputs, in bytes, with chunks of 16 tokens."""
    # The definition goes over a chunk in blocks of a constant size: here of one row.
    monkeypatch.setattr(rows, "_BLOCK_BYTES_CPU", ROW)
    step = step_of(name, mode, Shape(n=n, vocab=VOCAB, hidden=8), on, dtype, chunk_bytes=BUDGET)
    step()
    outputs = ("trained" in mode) * VOCAB * 8 * 4
    outputs += ("no_grad" not in mode) * n * 8 * dtype.itemsize
    return peak_bytes(allocations(step)) - outputs


@pytest.mark.parametrize("on", HERE)
@pytest.mark.parametrize("op", LINEAR, ids=lambda op: op.name)
@pytest.mark.parametrize("chunk_bytes", [1, 7 * 67 * 4, 10**9])
def test_the_size_of_a_chunk_changes_nothing_but_rounding(op, chunk_bytes, on):
    inputs = place(op.make_inputs(Shape(n=15, vocab=67, hidden=16), torch.float32, 0), on)
    want = run(op, op.function, inputs, backend=on)
    got = run(op, op.function, inputs, backend=on, chunk_bytes=chunk_bytes)
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
