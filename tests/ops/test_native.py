"""What is true of the C++ kernels alone: threads, vector widths, memory, how they are found."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastppo.ops import (
    arguments,
    backend,
    gae,
    native_library,
    policy_loss,
    token_kl,
    token_logprobs,
    value_loss,
    whiten,
)
from fastppo.ops.backends import native
from tests.ops.oracle import run
from tests.ops.registry import OPS, Shape

pytestmark = pytest.mark.skipif(
    native_library.LIBRARY is None, reason=f"no native kernels: {native_library.OBSTACLE}"
)
ROOT = Path(__file__).parents[2]
# Past the sizes below which one thread does it all, past a block, and no multiple of a register.
LARGE = Shape(n=48, vocab=4099, hidden=24, batch=5)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_one_two_and_four_threads_give_the_same_bits(op):
    by_token = op.name in ("gae", "advantages", "whiten", "token_kl", "value_loss")
    shape = Shape(n=70_000, batch=9) if by_token else LARGE
    inputs = op.make_inputs(shape, torch.float32, 1)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            # A GEMM's own order is the library's affair.
            if op.name.startswith("linear") and threads != before:
                continue
            torch.set_num_threads(threads)
            results, grads = run(op, op.function, inputs, backend="native")
            found.append([*results, *grads])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_written_past_the_caches_or_not_is_the_same_to_the_bit(monkeypatch):
    """A large gradient is streamed where its rows begin a line; the numbers must not show it."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = OPS["policy_loss"].make_inputs(Shape(n=6, vocab=4096 + 32), dtype, 2)
        grads = []
        for least in (1, 1 << 40):
            monkeypatch.setattr(native, "_STREAM_BYTES", least)
            leaf = inputs["logits_NV"].clone().requires_grad_()
            policy_loss(**{**inputs, "logits_NV": leaf}, backend="native").loss.backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)


@pytest.mark.parametrize("tau", [1.0, 0.7, 3.0])
def test_the_exponential_keeps_its_stated_error(tau):
    """3.3e-7 + 6e-8 |d / tau|, seen through the gradient of a row of two words."""
    d = torch.linspace(0, 80 * tau, 20001)
    logits = torch.stack([torch.zeros_like(d), -d], dim=1)
    # dlogprob[0] / dlogits[1] = -p[1] / tau, and p[1] = exp(-d / tau) / (1 + exp(-d / tau))
    p = torch.softmax(logits.double() / tau, -1)
    leaf = logits.clone().requires_grad_()
    first = torch.zeros_like(d).long()
    found = token_logprobs(leaf, first, temperature=tau, backend="native")
    found.logprob_N.sum().backward()
    relative = (tau * leaf.grad[:, 1].double() + p[:, 1]).abs() / p[:, 1]
    # three roundings more: the quotient by the total, by tau, and the product here
    assert (relative <= 3.3e-7 + 6e-8 * d.double() / tau + 2e-7).all()


def test_k3_and_its_slope_lose_nothing_near_0_and_hold_far_out():
    """exp(-d) - 1 + d cancels near 0 and leaves float32 beyond 88."""
    near = torch.logspace(-6, 1.9, 20001, dtype=torch.float64)
    d = torch.cat([-near, near, torch.zeros(1, dtype=torch.float64)]).float()
    leaf = d.clone().requires_grad_()
    kl = token_kl(leaf, torch.zeros_like(d), kind="k3", log_ratio_limit=200.0, backend="native")
    kl.sum().backward()
    exact = torch.expm1(-d.double())
    # By its series where the difference cancels even in float64.
    small = d.double().abs() < 1e-3
    square = d.double().square()
    want = torch.where(small, square / 2 - d.double() * square / 6, exact + d.double())
    assert ((kl.double() - want).abs() <= 5e-7 * want).all()
    assert ((leaf.grad.double() + exact).abs() <= 5e-7 * exact.abs()).all()
    for far, value, slope in ((-100.0, math.inf, -math.inf), (150.0, 149.0, 1.0)):
        leaf = torch.tensor([far], requires_grad=True)
        kl = token_kl(leaf, torch.zeros(1), kind="k3", log_ratio_limit=200.0, backend="native")
        kl.backward()
        assert (kl.item(), leaf.grad.item()) == (value, slope)


@pytest.mark.parametrize("n", [1, 15, 4097, 1_200_003])
def test_sums_over_any_number_of_tokens_are_right(n):
    """Blocks, the rest of a register, and more tokens than 256 blocks of 4096."""
    generator = torch.Generator().manual_seed(n)
    value, old, target = (torch.randn(n, generator=generator) for _ in range(3))
    weight = torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) > 0.3)
    # What weighs nothing is not read.
    value, target = (torch.where(weight == 0, torch.nan, x) for x in (value, target))
    leaf = value.clone().requires_grad_()
    found = value_loss(leaf, old, target, weight, clip=0.2, backend="native")
    found.loss.backward()
    wide = value.double().requires_grad_()
    want = value_loss(wide, old.double(), target.double(), weight.double(), backend="torch")
    want.loss.backward()
    for mine, right in zip((found.loss, *found.metrics), (want.loss, *want.metrics), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-6, atol=1e-6)
    for mask in (None, weight):
        x = old if mask is None else value
        mine = whiten(x, weight_N=mask, backend="native")
        right = whiten(x.double(), weight_N=mask)
        torch.testing.assert_close(mine.double(), right, rtol=1e-6, atol=1e-6)


@pytest.mark.slow  # a process that imports torch
def test_there_is_one_openmp_runtime():
    """Two pools of threads would spin against each other."""
    done = python(
        "import torch; from fastppo.ops import policy_loss, whiten; whiten(torch.ones(100_000));"
        "print({line.split()[-1] for line in open('/proc/self/maps')"
        " if 'gomp' in line or 'iomp' in line or 'libomp' in line})"
    )
    assert done.returncode == 0, done.stderr
    assert len(eval(done.stdout)) == 1, done.stdout


@pytest.fixture
def loaded_anew(monkeypatch):
    """The library as a process with this FASTPPO_CPU loads it. What every width computes is
    test_edges.py's."""
    before = native_library.isa()

    def load(wanted):
        monkeypatch.setenv("FASTPPO_CPU", wanted)
        library, obstacle = native_library._load()
        monkeypatch.setattr(native_library, "LIBRARY", library)
        monkeypatch.setattr(native_library, "OBSTACLE", obstacle)
        monkeypatch.setattr(arguments, "_chosen", {})

    yield load
    monkeypatch.undo()
    native_library.LIBRARY.fastppo_use_isa(native_library.ISAS.index(before))


@pytest.mark.parametrize("isa", native_library.ISAS)
def test_a_vector_width_is_chosen_or_the_processor_has_none_of_it(isa, loaded_anew):
    widest = native_library.ISAS.index(native_library.isa())
    loaded_anew(isa)
    if native_library.ISAS.index(isa) <= widest:
        assert native_library.isa() == isa
        return
    with pytest.raises(ValueError, match=f"this processor has no {isa}"):
        whiten(torch.ones(2), backend="native")


def test_an_unknown_vector_width_is_refused(loaded_anew):
    loaded_anew("avx1024")
    wanted = "FASTPPO_CPU='avx1024' is none of portable, avx2, avx512"
    with pytest.raises(ValueError, match=wanted):
        whiten(torch.ones(2), backend="native")


def test_without_the_library_it_says_so_once_and_runs(monkeypatch):
    monkeypatch.setattr(native_library, "OBSTACLE", "the C++ kernels were not built; build them")
    monkeypatch.setattr(backend, "_said", [])
    monkeypatch.setattr(arguments, "_chosen", {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            gae(torch.ones(3), torch.ones(3), torch.tensor([0, 3]))
    messages = [str(w.message) for w in caught]
    assert messages == [
        "fastppo.ops runs in PyTorch, several times slower: "
        "the C++ kernels were not built; build them"
    ]
    with pytest.raises(ValueError, match=r"cannot run: .* were not built"):
        gae(torch.ones(3), torch.ones(3), torch.tensor([0, 3]), backend="native")


# The files that a call enters besides its operator, its arguments and its backend: the kinds of its
# scalars; for a loss the gradient that its forward made; for a call from hidden states the head,
# its operands, and the operator over logits that it shares.
BESIDES = {
    "gae": {"checks"},
    "whiten": {"checks"},
    "advantages": {"checks"},
    "policy_loss": {"gradient_made"},
    "linear_policy_loss": {"checks", "operands", "head", "policy_loss", "gradient_made"},
    "linear_token_logprobs": {"checks", "operands", "head", "token_logprobs", "linear_passes"},
    "linear_score_tokens": {"checks", "operands", "head", "score_tokens"},
}


# Python functions of a call, and of its backward where there is one.
FUNCTIONS = {
    "token_kl": 22,
    "gae": 21,
    "whiten": 14,
    "advantages": 38,
    "token_logprobs": 38,
    "linear_token_logprobs": 88,
    "policy_loss": 53,
    "linear_policy_loss": 109,
    "score_tokens": 18,
    "linear_score_tokens": 55,
    "value_loss": 22,
}


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_a_call_goes_through_its_operator_its_arguments_and_its_backend_alone(op):
    """And `workspace`, which has memory of N x V; then the kernel and its row, in C++.

    How many Python functions that is, is most of what a call costs the host.
    """
    inputs = op.make_inputs(Shape(n=4, vocab=64, hidden=8, batch=2), torch.float32, 3)
    run(op, op.function, inputs, backend="native")  # imports, and the backend's choice
    entered = []

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT / "fastppo" / "ops"):
            entered.append(path.stem)

    sys.setprofile(note)
    try:
        run(op, op.function, inputs, backend="native")
    finally:
        sys.setprofile(None)
    files = {op.name, "arguments", "native", *BESIDES.get(op.name, ())}
    assert set(entered) - {"workspace"} == files
    assert len(entered) <= FUNCTIONS[op.name]
