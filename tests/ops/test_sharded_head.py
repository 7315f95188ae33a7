"""A vocabulary that is shared out over processes: what they compute is what one would."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier, Lock
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo.ops import linear_policy_loss, linear_token_logprobs
from fastppo.ops.arguments import RowArguments
from fastppo.ops.backends import BACKENDS, Statistics, TokenKernels
from fastppo.ops.sharded_head import ShardedKernels, VocabShard
from fastppo.ops.token_logprobs import empty_statistics
from tests.limits import HANGS
from tests.ops import ranks
from tests.ops.oracle import device_of
from tests.ops.ranks import (
    BY_WORD,
    CASES,
    COMPUTED,
    DTYPES,
    F64,
    LOSS_TRAINED,
    LOSSES,
    ROWS,
    SHARES,
    TRAINED,
    D,
    N,
    V,
    budget,
)

# Of a dtype: how far log-probs and gradients may be from those of the operator over all words.
CLOSE = {
    "float64": ({"atol": 1e-11, "rtol": 1e-11}, {"atol": 1e-11, "rtol": 1e-11}),
    "float32": ({"atol": 3e-6, "rtol": 1e-5}, {"atol": 5e-6, "rtol": 2e-5}),
    # A gradient of 16-bit hidden states is rounded to 16 bits, a unit in the last place either way.
    "bfloat16": ({"atol": 3e-6, "rtol": 1e-5}, {"atol": 2e-2, "rtol": 2e-2}),
}


@pytest.fixture(scope="module", params=SHARES, ids=str)
def shared(request, tmp_path_factory) -> list[dict[Any, Any]]:
    """What each rank computes, by case."""
    sizes, out = request.param, tmp_path_factory.mktemp("ranks")
    return ranks.on_ranks(ranks.everything, len(sizes), out, sizes)


def merged(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of all ranks as those of one, which has all words."""
    first = results[0]
    for name, x in first.items():
        if name in BY_WORD:
            continue
        for other in results[1:]:
            assert torch.equal(x.nan_to_num(), other[name].nan_to_num()), f"{name} by rank"
    return {
        name: torch.cat([each[name] for each in results]) if name in BY_WORD else x
        for name, x in first.items()
    }


def same(got: dict[str, Tensor], want: dict[str, Tensor], kind: str = "float64") -> None:
    assert got.keys() == want.keys()
    values, gradients = CLOSE[kind]
    for name, x in got.items():
        close = gradients if name in ("hidden_ND", *ranks.HEAD) else values
        assert x.dtype == want[name].dtype, name
        torch.testing.assert_close(x, want[name], **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_the_operator_does_over_all_words(shared, name):
    for kind, what in COMPUTED:
        dtype = DTYPES[kind]
        got = merged([each[kind, name, what][0] for each in shared])
        rows = {"chunk_bytes": budget((V,), dtype)}  # a bf16 product rounds by their number
        same(got, ranks.logprobs(ranks.inputs_of(name, dtype), what, **rows), kind)


def definition(inputs: dict[str, Any], what: str) -> dict[str, Tensor]:
    """Log-probs, entropies and their gradients by torch's own log_softmax over all logits."""
    given, leaves = ranks.leaves_of(inputs, what)
    token, lead = given["token_N"], given["hidden_ND"].shape[:-1]
    several = token.ndim > len(lead)
    live = token != given.get("ignore_index", -100)
    if given.get("mask") is not None:
        live = live & given["mask"]
    row = live.any(-1) if several else live
    hidden = torch.where(row[..., None], given["hidden_ND"], 0)
    x = hidden @ given["weight_VD"].T
    if given.get("bias_V") is not None:
        x = x + given["bias_V"]
    if given.get("head_lora") is not None:
        lora = given["head_lora"]
        x = x + lora.scaling * (hidden @ lora.A_RD.T) @ lora.B_VR.T
    x = x[..., : given.get("vocab_size")] * given.get("logit_scale", 1.0)
    if given.get("softcap") is not None:
        x = given["softcap"] * torch.tanh(x / given["softcap"])
    tau = given.get("temperature", 1.0)
    z = x / (tau[..., None] if isinstance(tau, Tensor) else tau)
    log_p = z.log_softmax(-1)
    index = torch.where(live, token, 0)
    logprob = log_p.gather(-1, index if several else index[..., None])
    logprob = torch.where(live, logprob if several else logprob[..., 0], 0)
    finite = log_p.masked_fill(log_p == -float("inf"), 0)
    entropy = torch.where(row, -(finite.exp() * finite).sum(-1), 0)
    found = {"logprob_N": logprob.detach(), "entropy_N": entropy.detach()}
    if given.get("return_lse"):
        found["lse_N"] = torch.where(row, z.logsumexp(-1), 0).detach()
    if leaves:
        entropy = entropy if given.get("entropy_grad") else entropy.detach()
        ranks.scalar(logprob, entropy).backward()
    return found | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_the_definition_in_float64(shared, name):
    for what in TRAINED:
        got = merged([each["float64", name, what][0] for each in shared])
        same(got, definition(ranks.inputs_of(name), what))


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_losses_metrics_and_gradients_are_those_over_all_words(shared, name):
    for what in LOSS_TRAINED:
        got = merged([each["loss", name, what][0] for each in shared])
        same(got, ranks.losses(ranks.loss_inputs(name), what, chunk_bytes=budget((V,), F64)))


@pytest.mark.slow
def test_every_rank_makes_the_same_reductions_however_unequal_the_shards(shared):
    """Of one with 90 words and one with 7, each would cut its tokens into other chunks."""
    for case in shared[0]:
        first, *others = [each[case][1] for each in shared]
        assert all(other == first for other in others), case


@pytest.mark.slow
def test_a_chunk_costs_two_reductions_of_rows_and_one_of_hidden_states(shared):
    agreement, chunks = 1, -(-N // ROWS)

    def counts(case: tuple[str, str, str]) -> tuple[int, int]:
        shapes = [shape for _, shape in shared[0][case][1]]
        wide = sum(len(shape) == 2 and shape[1] == D for shape in shapes)
        return len(shapes) - agreement - wide, wide

    for what, wide in (("nothing", 0), ("hidden states", 1), ("everything", 1)):
        assert counts(("float64", "plain", what)) == (2 * chunks, wide * chunks)
    # The backward of a trained head makes its own logits again, of whole rows' statistics.
    assert counts(("float64", "plain", "the head alone")) == (2 * chunks, 0)
    assert counts(("loss", "ppo_clip", "hidden states")) == (2 * chunks, chunks)


@pytest.mark.slow
def test_a_rank_never_has_all_rows_of_its_logits(tmp_path):
    """Of (2048, 512) they would be 4 MiB. Here they are made twice: log-probs, then gradients."""
    for found in ranks.on_ranks(ranks.peak, 2, tmp_path):
        assert 0 < found < 1 << 20


@pytest.mark.slow
def test_without_the_reduction_the_ranks_parts_add_up_to_the_gradient(tmp_path):
    """Hidden states gathered from parts of a sequence are reduced by their own backward."""
    one, other = ranks.on_ranks(ranks.part, 2, tmp_path)
    want = ranks.logprobs(ranks.inputs_of("plain"), "hidden states")["hidden_ND"]
    for what in one:
        torch.testing.assert_close(one[what] + other[what], want, atol=1e-12, rtol=1e-12)
        assert not torch.allclose(one[what], want)


@pytest.mark.slow
def test_ranks_that_differ_are_named_on_every_rank(tmp_path):
    one, other = ranks.on_ranks(ranks.refused, 2, tmp_path)
    cure = (
        "; give all ranks the same hidden states, tokens and settings, and each its shard of the "
        "head"
    )
    begins = "linear_token_logprobs: "
    rank = begins + "rank 1 of group has another "
    for found in (one, other):
        assert found["tokens"] == rank + "shape of hidden_ND, shape of token_N than rank 0" + cure
        assert found["chunks"] == rank + "chunk_bytes than rank 0" + cure
        assert found["gradient"] == rank + "requires_grad than rank 0" + cure
        same = "token_N must be the same on every rank of group, came others"
        assert found["values"] == begins + same
        assert found["range"].startswith(begins + f"token_N must lie in [0, {V}) or be -100")
        assert found["vocab_size"] == begins + f"vocab_size must lie in [1, {V}], came {V + 1}"
        assert "group= needs tensors with values" in found["meta"]


@pytest.mark.parametrize("function", [linear_token_logprobs, linear_policy_loss])
def test_what_is_no_group_is_refused(function):
    given = ranks.inputs_of("plain")
    if function is linear_policy_loss:
        given = ranks.loss_inputs("ppo_clip")
    wanted = r"group must be a torch.distributed.ProcessGroup or None, came int"
    with pytest.raises(TypeError, match=rf"^{function.__name__}: {wanted}$"):
        function(**given, group=2)


@pytest.mark.slow
def test_a_compiled_caller_is_told_to_wrap_the_call(tmp_path):
    for found in ranks.on_ranks(ranks.compiled, 2, tmp_path):
        assert found["error"].endswith("wrap it in torch.compiler.disable(linear_token_logprobs)")
        assert found["wrapped"]


class Turns:
    """Threads that stand for ranks run one at a time, and meet to exchange a tensor."""

    def __init__(self, size: int) -> None:
        self.turn, self.meeting = Lock(), Barrier(size, timeout=HANGS)
        self.left = [torch.empty(0)] * size

    def exchange(self, rank: int, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        self.left[rank] = x.clone()
        self.turn.release()
        self.meeting.wait()
        found = reduce(torch.stack(self.left))
        self.meeting.wait()
        self.turn.acquire()
        return x.copy_(found)


@dataclass(frozen=True)
class ThreadShard(VocabShard):
    rank: int
    turns: Turns

    def sum(self, x: Tensor) -> Tensor:
        return self.turns.exchange(self.rank, x, lambda parts: parts.sum(0))

    def max(self, x: Tensor) -> Tensor:
        return self.turns.exchange(self.rank, x, lambda parts: parts.amax(0))


def test_kernels_of_parts_of_rows_give_what_those_of_whole_rows_do(backend):
    """On every backend. One row is masked in one part, one in the other, and one is ignored."""
    n, vocab, sizes, device = 6, 37, (30, 7), device_of(backend)
    dtype = F64 if backend == "torch" else torch.float32
    generator = torch.Generator().manual_seed(2)
    x_NV = (3 * torch.randn(n, vocab, generator=generator, dtype=F64)).to(device, dtype)
    x_NV[1, 30:], x_NV[2, :30] = -float("inf"), -float("inf")
    token_N = torch.tensor([3, 12, 31, -100, 36, 29], device=device)
    tau_N = torch.linspace(0.5, 2, n, device=device, dtype=dtype)
    g_N, h_N = torch.randn(2, n, generator=generator, dtype=F64).to(device, dtype)
    rows, at = RowArguments(token_N, tau_N, 6.0, -100), slice(0, n)

    def found(kernels: TokenKernels, part_NV: Tensor) -> tuple[Statistics, Tensor]:
        stats, out_NV = empty_statistics(part_NV, backend), torch.empty_like(part_NV)
        kernels.token_logprobs(part_NV, rows, at, stats)
        kernels.token_logprobs_backward(part_NV, out_NV, rows, at, stats, g_N, h_N)
        return stats, out_NV

    turns = Turns(len(sizes))

    def one(rank: int) -> tuple[Statistics, Tensor]:
        start = sum(sizes[:rank])
        size: Any = (None, start, sizes[rank], vocab, max(sizes), True, rank, turns)
        with turns.turn:
            part_NV = x_NV[:, start : start + sizes[rank]].contiguous()
            return found(ShardedKernels(ThreadShard(*size), rows, backend), part_NV)

    stats, out_NV = found(BACKENDS[backend], x_NV)
    with ThreadPoolExecutor(len(sizes)) as threads:
        parts = list(threads.map(one, range(len(sizes))))
    live_N = token_N != -100
    close = {"atol": 1e-12, "rtol": 1e-12} if dtype == F64 else {"atol": 3e-6, "rtol": 1e-5}
    for part, _ in parts:
        for whole_N, part_N in zip(stats, part, strict=True):
            torch.testing.assert_close(part_N[live_N], whole_N[live_N], **close)
        assert not part.logprob_N[~live_N].any()
        assert not part.entropy_N[~live_N].any()
    torch.testing.assert_close(torch.cat([part for _, part in parts], 1), out_NV, **close)
