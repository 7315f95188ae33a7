"""What a GPU alone shows: real vocabularies, 64-bit addresses, races, waits, compilations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.gpu import candidates
from fastppo.ops import policy_loss, token_logprobs
from fastppo.ops.arguments import loss_arguments, row_arguments
from fastppo.ops.backends import triton
from fastppo.ops.backends.sizes import forced
from fastppo.ops.policy_loss import empty_loss_rows
from tests.ops.oracle import check, place
from tests.ops.registry import OPS, Shape

DENSE = ("token_logprobs", "policy_loss", "score_tokens")


@dataclass(frozen=True)
class Sizes:
    """Real sizes, and toy ones for a rehearsal without a GPU."""

    rows: int
    vocabularies: tuple[int, ...]
    hidden: Shape
    many_rows: int
    longest: int  # tokens of a sequence; shorter ones have every length up to `every`
    every: int
    raced: tuple[int, ...]  # vocabularies
    raced_rows: int
    repeats: int


CUDA = torch.cuda.is_available()
SIZES = (
    Sizes(
        rows=16,
        vocabularies=(151936, 32000, 50257, 128256, 152064, 49152, 256000),
        hidden=Shape(n=48, vocab=32000, hidden=64),
        many_rows=70_000,
        longest=5000,
        every=2100,
        raced=(4096, 4097, 32000),
        raced_rows=264,
        repeats=200,
    )
    if CUDA
    else Sizes(
        rows=2,
        vocabularies=(97,),
        hidden=Shape(n=6, vocab=97, hidden=16),
        many_rows=5,
        longest=40,
        every=4,
        raced=(2049,),
        raced_rows=2,
        repeats=1,
    )
)
DEVICE = "cuda" if CUDA else "cpu"
on_a_gpu = pytest.mark.skipif(not CUDA, reason="it is about the device's memory, waits or compiler")


@pytest.mark.parametrize("vocab", SIZES.vocabularies)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_the_rule_at_real_vocabularies(name, dtype, vocab):
    check(OPS[name], OPS[name].make_inputs(Shape(n=SIZES.rows, vocab=vocab), dtype, 0), "triton")


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [32000, 50257])
def test_the_rule_by_every_method(dtype, vocab):
    """That a launch may have besides a tile at a time, before any of them is timed."""
    inputs = OPS["policy_loss"].make_inputs(Shape(n=SIZES.rows, vocab=vocab), dtype, 0)
    tried = candidates.launch_sizes("policy_loss", dtype.itemsize, vocab)[0].values()
    methods = {config.method: config for config in tried if config.method != "tiles"}
    assert {"ahead", "two launches"} <= set(methods)
    for config in methods.values():
        with forced(config):
            check(OPS["policy_loss"], inputs, "triton")


@pytest.mark.parametrize("name", ["linear_token_logprobs", "linear_policy_loss"])
def test_the_rule_from_hidden_states(name):
    check(OPS[name], OPS[name].make_inputs(SIZES.hidden, torch.float32, 1), "triton")


def test_more_rows_than_a_grid_is_wide():
    n = SIZES.many_rows
    inputs = place(OPS["policy_loss"].make_inputs(Shape(n=n, vocab=64), torch.float32, 2), "triton")
    got, want = (policy_loss(**inputs, backend=b) for b in ("triton", "torch"))
    torch.testing.assert_close(got.loss, want.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.logprob_N[-9:], want.logprob_N[-9:], atol=1e-5, rtol=1e-5)


@on_a_gpu
def test_addresses_past_31_bits():
    """The last row of N*V > 2^31 logits is the row that it would be alone."""
    vocab = 151936
    n = 2**31 // vocab + 8
    logits = torch.randn(n, vocab, device="cuda", dtype=torch.bfloat16)
    token = torch.randint(vocab, (n,), device="cuda")
    assert logits.numel() > 2**31
    for rows in (slice(n - 1, n), slice(0, 1)):
        with torch.no_grad():
            whole, alone = token_logprobs(logits, token), token_logprobs(logits[rows], token[rows])
        assert torch.equal(whole.logprob_N[rows], alone.logprob_N)
    flat = {"behaviour_logprob_N": whole.logprob_N, "weight_N": torch.ones(n, device="cuda")}
    advantage = torch.randn(n, device="cuda")
    last = slice(n - 1, n)
    few = {k: x[last] for k, x in flat.items()}
    want = logits[last].clone().requires_grad_()
    policy_loss(want, token[last], advantage_N=advantage[last], **few).loss.backward()
    logits = logits.requires_grad_() * 1  # no leaf
    result = policy_loss(logits, token, advantage_N=advantage, inplace=True, **flat)
    result.loss.backward()
    assert torch.equal(logits.detach()[last], want.grad)


@pytest.mark.parametrize("name", ["gae", "advantages"])
def test_scans_of_every_length(name):
    """Sequences of 1 to 2100 tokens and one of 5000, 20 times: what no interpreter shows."""
    lengths = torch.tensor([*range(1, SIZES.every + 1), SIZES.longest])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    op = OPS[name]
    inputs = op.make_inputs(Shape(n=int(offsets[-1]), batch=len(lengths)), torch.float32, 6)
    inputs = place({**inputs, "offsets": offsets, "gamma": 0.99}, "triton")
    first = op.function(**inputs, backend="triton")
    for a, b in zip(first, op.function(**inputs, backend="torch"), strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)
    for _ in range(min(20, SIZES.repeats)):
        again = op.function(**inputs, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def raced(vocab: int) -> list[str]:
    """Labels of launches: the table's, and the last candidate of each method."""
    sizes, table = candidates.launch_sizes("policy_loss", 2, vocab)
    if not CUDA:
        return [table]
    return list(dict.fromkeys([table, *{c.method: label for label, c in sizes.items()}.values()]))


RACED = [(vocab, label) for vocab in SIZES.raced for label in raced(vocab)]


@pytest.mark.parametrize(("vocab", "label"), RACED)
def test_in_place_is_no_race(vocab, label):
    """200 repeats, bit for bit, sampled tokens at both ends and at the borders of tiles."""
    sizes, _ = candidates.launch_sizes("policy_loss", 2, vocab)
    config = sizes[label]
    borders = [0, vocab - 1, *(x for x in (1023, 1024, 2047, 2048, 4095) if x < vocab), vocab // 2]
    n = SIZES.raced_rows
    inputs = place(
        OPS["policy_loss"].make_inputs(Shape(n=n, vocab=vocab), torch.bfloat16, 3), "triton"
    )
    inputs["token_N"] = torch.tensor([borders[i % len(borders)] for i in range(n)], device=DEVICE)
    logits = inputs.pop("logits_NV")
    rows, loss = _arguments(logits, inputs)
    everything = slice(0, n)
    apart = torch.empty_like(logits)
    first = empty_loss_rows(logits, "triton")
    triton.policy_loss(logits, apart, rows, loss, everything, first, config)
    for _ in range(SIZES.repeats):
        together = logits.clone()
        into = empty_loss_rows(logits, "triton")
        triton.policy_loss(together, together, rows, loss, everything, into, config)
        assert torch.equal(together, apart)
        assert torch.equal(into.term_MN, first.term_MN)


def _arguments(logits: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    rows = row_arguments(
        "test",
        inputs["token_N"],
        logits,
        logits.shape[1],
        temperature=1.0,
        softcap=None,
        ignore_index=-100,
        check=False,
    )
    vectors = {k: x for k, x in inputs.items() if k.endswith("_N") and k != "token_N"}
    loss = loss_arguments(
        "test",
        logits,
        **vectors,
        importance_weight_N=None,
        offsets=None,
        kl_coef=inputs["kl_coef"],
        entropy_coef=inputs["entropy_coef"],
        config=None,
        grad_scale=None,
    )
    return rows, loss


@on_a_gpu
def test_nothing_waits_for_the_device():
    """Forward and backward of every op; a wait is an error in this mode."""
    for op in OPS.values():
        shape = Shape(n=64, vocab=512, hidden=32, batch=4)
        inputs = place(op.make_inputs(shape, torch.float32, 4), "triton")
        for name in op.differentiable:
            inputs[name] = inputs[name].requires_grad_()
        op.function(**inputs)  # compiled and loaded before
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = op.function(**inputs)
            if op.loss:
                getattr(result, op.loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_50_changing_steps_compile_nothing_new():
    """Lengths, coefficients and temperature change as in training."""
    op = OPS["policy_loss"]
    kernel = triton.policy_loss_kernels.policy_loss_kernel
    compiled = []
    for i in range(50):
        inputs = place(
            op.make_inputs(Shape(n=32 + 16 * i, vocab=1024), torch.bfloat16, i), "triton"
        )
        inputs |= {"kl_coef": 0.1 + 0.01 * i, "temperature": 1 + 0.01 * i}
        leaf = inputs["logits_NV"].requires_grad_()
        policy_loss(**{**inputs, "logits_NV": leaf}).loss.backward()
        compiled.append(sum(len(cache[0]) for cache in kernel.device_caches.values()))
    assert compiled[-1] == compiled[0]


@on_a_gpu
def test_memory_above_the_logits_is_their_gradient_alone():
    op = OPS["policy_loss"]
    shape = Shape(n=512, vocab=128256)
    inputs = place(op.make_inputs(shape, torch.bfloat16, 5), "triton")
    inputs["logits_NV"] = inputs["logits_NV"].requires_grad_()
    bytes_NV = shape.n * shape.vocab * 2
    for inplace, most in ((False, 1.0), (True, 0.0)):
        source = inputs["logits_NV"] * 1
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        policy_loss(**{**inputs, "logits_NV": source}, inplace=inplace)
        above = torch.cuda.max_memory_allocated() - before
        assert above <= most * bytes_NV + (1 << 20)
        del source
