"""Where rows of logits begin: any address and any stride, for the kernels that load 16 bytes.

Triton's interpreter knows addresses, so it shows what a kernel reads and writes at each of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastppo.ops import policy_loss
from tests.ops.conftest import FUSED
from tests.ops.oracle import check, place, run
from tests.ops.registry import OPS, Shape
from tests.tiers import slow_unless

ROOT = Path(__file__).parents[2]
DENSE = ("token_logprobs", "policy_loss", "score_tokens")
ITEMSIZE = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}

# The fast tier has each kernel and each dtype once.
ONE = {
    "token_logprobs": torch.float32,
    "policy_loss": torch.bfloat16,
    "score_tokens": torch.float16,
}
EVERY_KERNEL = pytest.mark.parametrize(
    ("name", "dtype"),
    slow_unless(lambda name, dtype: ONE[name] is dtype, product(DENSE, ITEMSIZE)),
    ids=str,
)

pytestmark = pytest.mark.skipif("triton" not in FUSED, reason="no Triton here")


def placed(x_NV: Tensor, first: int, gap: int) -> Tensor:
    """The matrix `first` entries into NaN, with `gap` of NaN between its rows."""
    n, vocab = x_NV.shape
    memory = torch.full((first + n * (vocab + gap),), float("nan"), dtype=x_NV.dtype)
    memory = memory.to(x_NV.device)
    return memory.as_strided((n, vocab), (vocab + gap, 1), first).copy_(x_NV)


@EVERY_KERNEL
def test_the_rule_wherever_rows_begin(name, dtype):
    """Rows shorter than a vector, of a vector and some, of several tiles; at every address."""
    op, generator = OPS[name], torch.Generator().manual_seed(0)
    for vocab in (1, 5, 23, 1029):
        for _ in range(2):
            inputs = place(op.make_inputs(Shape(n=2, vocab=vocab), dtype, vocab), "triton")
            for key in [key for key in inputs if key.endswith("logits_NV")]:
                first, gap = torch.randint(0, 9, (2,), generator=generator).tolist()
                inputs[key] = placed(inputs[key], first, gap)
            check(op, inputs, "triton")


@EVERY_KERNEL
def test_rows_at_addresses_that_16_divides_give_the_same_bits(name, dtype):
    """However far they are apart, and so whatever the batch around a token is."""
    op, vector = OPS[name], 16 // ITEMSIZE[dtype]
    inputs = place(op.make_inputs(Shape(n=3, vocab=1032), dtype, 1), "triton")
    want = run(op, op.function, inputs, backend="triton")
    for key in [key for key in inputs if key.endswith("logits_NV")]:
        inputs[key] = placed(inputs[key], vector, 3 * vector)
    got = run(op, op.function, inputs, backend="triton")
    pairs = zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("first", slow_unless(lambda first: first in (0, 1, 8), range(9)))
def test_in_place_touches_its_rows_alone(first):
    """Everything before, between and behind them is as it was."""
    op = OPS["policy_loss"]
    inputs = place(op.make_inputs(Shape(n=3, vocab=77), torch.bfloat16, 2), "triton")
    logits_NV = inputs.pop("logits_NV")
    leaf = logits_NV.clone().requires_grad_()
    policy_loss(leaf, **inputs, backend="triton").loss.backward()
    memory = torch.linspace(1, 2, 600, device=logits_NV.device).bfloat16()
    before = memory.clone()
    rows = memory.as_strided((3, 77), (80, 1), first)
    rows.copy_(logits_NV)
    source = memory.clone().requires_grad_() * 1.0
    view = source.as_strided((3, 77), (80, 1), first)
    policy_loss(view, **inputs, inplace=True, backend="triton").loss.backward()
    written = source.detach().as_strided((3, 77), (80, 1), first)
    torch.testing.assert_close(written, leaf.grad, atol=1e-5, rtol=8e-3)  # a bfloat16's last bit
    mask = torch.zeros(600, dtype=torch.bool, device=memory.device)
    mask.as_strided((3, 77), (80, 1), first).fill_(True)
    assert torch.equal(source.detach()[~mask], before[~mask])


# Rows of huge logits: a float32's difference of two neighbours is 64 and more.
FAR = {
    "one is largest": ([3e9, 1.0, 2e9, -5e9], [0.0]),
    "two are largest": ([3e9, 3e9, 1.0, 2e9], [-0.6931472]),
    "all masked by the lowest float": ([torch.finfo(torch.float32).min] * 4, [-1.3862944]),
    "the smallest of huge ones": ([-3e9, -2e9, -3e9, -3e9], [-1e9]),
}


@pytest.mark.parametrize("row", FAR)
def test_huge_logits_by_hand(row, backend):
    """The log-prob of the first: ln of its share of the largest ones, or its distance to them."""
    from fastppo.ops import token_logprobs

    logits, (want,) = FAR[row]
    x = torch.tensor([logits], device=place({"x": torch.ones(1)}, backend)["x"].device)
    found = token_logprobs(x, torch.zeros(1, dtype=torch.long, device=x.device), backend=backend)
    assert found.logprob_N.item() == pytest.approx(want, rel=1e-6, abs=1e-6)
    assert found.entropy_N.isfinite().all()


COUNT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from fastppo.ops import backend, policy_loss
from fastppo.ops.backends import triton, triton_tokens

backend._obstacle = lambda *_: None  # no GPU: nothing is launched
target, keys = make_backend(GPUTarget("cuda", 90, 32)), {}

def start(kernel, grid, device, arguments, **meta):
    vector = lambda x: isinstance(x, torch.Tensor) and x.ndim == 1
    packed = [x.contiguous() if vector(x) else x for x in arguments]
    options = {k: v for k, v in meta.items() if not k.startswith("num_")}
    binder = create_function_from_signature(kernel.signature, kernel.params, target)
    _, specialization, _ = binder(*packed, **options)
    keys.setdefault(kernel.fn.__name__, set()).add(str(specialization))

triton.start = triton_tokens.start = start
for vocab in (1024, 1001):
    logits = torch.randn(64, vocab).bfloat16().requires_grad_()
    vectors = torch.zeros(3, 64)
    token = torch.zeros(64, dtype=torch.long)
    at = 0
    for step, rows in enumerate((3, 1, 2, 5, 8, 7, 16, 9, 4, 6)):
        part = slice(at, at + rows)
        at += rows
        options = {"kl_coef": 0.1 + 0.01 * step, "temperature": 1 + 0.01 * step}
        loss = policy_loss(
            logits[part], token[part], *vectors[:, part], ref_logprob_N=vectors[0, part],
            backend="triton", **options,
        ).loss
        loss.backward()
print({name: len(found) for name, found in keys.items()})
"""


@pytest.mark.slow
def test_micro_batches_of_one_packed_tensor_compile_nothing_new():
    """Of each vocabulary one kernel: rows of 1024 begin at such addresses, those of 1001 do not."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = eval(done.stdout)
    # What scales a gradient in place goes by vectors too, where the gradient begins at one.
    assert counts == {"policy_loss_kernel": 2, "sum_rows_kernel": 1, "scale_unless_one_kernel": 2}
