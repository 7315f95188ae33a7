"""Heads whose vocabulary is shared out over processes: inputs, and what each process computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import allocations, peak_bytes
from fastppo.ops import (
    HeadLora,
    PolicyLossConfig,
    gather_weight,
    linear_policy_loss,
    linear_token_logprobs,
)
from tests.limits import HANGS
from tests.reliability import runs
from tests.world import as_process, free_port

F64 = torch.float64
N, V, D = 13, 97, 8
ROWS = 3  # in a chunk
DTYPES = {"float64": F64, "float32": torch.float32, "bfloat16": torch.bfloat16}
SHARES = [(90, 7), (60, 0, 37)]  # words of each rank
HEAD = ("weight_VD", "bias_V", "A_RD", "B_VR")
BY_WORD = ("weight_VD", "bias_V", "B_VR")  # cut by vocabulary; A is the same on every rank
# What asks for a gradient, of what a case has.
TRAINED: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "hidden states": ("hidden_ND",),
    "adapters": ("hidden_ND", "bias_V", "A_RD", "B_VR"),
    "everything": ("hidden_ND", *HEAD),
    "the head alone": HEAD,
}


LOSS_TRAINED = ("nothing", "hidden states", "everything")
# What is computed in a dtype, by name: of float64 everything.
COMPUTED = [
    (kind, what)
    for kind in DTYPES
    for what in TRAINED
    if kind == "float64" or what in ("hidden states", "everything")
]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _bias() -> Tensor:
    return 0.3 * _random(3, V)


def _masked_shard() -> dict[str, Any]:
    bias, token = _bias(), _token() % 90
    bias[90:] = -float("inf")
    token[4] = 95
    return {"bias_V": bias, "token_N": token, "entropy_grad": True}


def _masked_positions() -> dict[str, Any]:
    hidden, mask = _random(1, 3, 4, D), torch.ones(3, 4, dtype=torch.bool)
    mask[0, 2] = mask[2] = False
    hidden[~mask] = float("nan")
    return {"hidden_ND": hidden, "token_N": _token()[:12].view(3, 4), "mask": mask}


def _labels() -> dict[str, Any]:
    token = torch.stack([_token(), _token().flip(0), (_token() + 50) % V], 1)
    token[0, 1], token[2], token[3, 0] = -100, -100, token[3, 1]
    return {"token_N": token, "entropy_grad": True, "softcap": 4.0}


def _ignored() -> dict[str, Any]:
    token = _token()
    token[:3] = 0
    return {"token_N": token, "ignore_index": 0, "return_lse": True}


def _token() -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(5))


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "the entropy's gradient, lse": lambda: {"entropy_grad": True, "return_lse": True},
    "all that a head may have": lambda: {
        "bias_V": _bias(),
        "A_RD": _random(7, 2, D),
        "B_VR": 0.3 * _random(8, V, 2),
        "softcap": 5.0,
        "logit_scale": 0.7,
        "temperature": torch.linspace(0.5, 2, N, dtype=F64),
        "entropy_grad": True,
        "return_lse": True,
    },
    "(B, T), a mask, NaN behind it": _masked_positions,
    "padding past vocab_size": lambda: {"token_N": _token() % 88, "vocab_size": 88},
    "several labels a row": _labels,
    "all tokens are words of one rank": lambda: {"token_N": _token() % 5},
    "the last words are masked, one of them is a token": _masked_shard,
    "the ignored token is a word": _ignored,
}


def inputs_of(name: str, dtype: torch.dtype = F64) -> dict[str, Any]:
    """The inputs of a case, of the whole vocabulary."""
    inputs = {
        "hidden_ND": _random(1, N, D),
        "weight_VD": 2 * _random(2, V, D) / D**0.5,
        "token_N": _token(),
        **CASES[name](),
    }
    operands = ("hidden_ND", *HEAD)
    return {k: x.to(dtype) if k in operands else x for k, x in inputs.items()}


def cut(inputs: dict[str, Any], sizes: tuple[int, ...], rank: int) -> dict[str, Any]:
    """The inputs of a rank."""
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    return {k: x[own].clone() if k in BY_WORD else x for k, x in inputs.items()}


def leaves_of(inputs: dict[str, Any], what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of an op, and those of them that ask for a gradient."""
    given = dict(inputs)
    leaves = {}
    for name in TRAINED[what]:
        if name in given:
            given[name] = leaves[name] = given[name].clone().requires_grad_()
    if "A_RD" in given:
        given["head_lora"] = HeadLora(given.pop("A_RD"), given.pop("B_VR"), 0.7)
    return given, leaves


def scalar(logprob: Tensor, entropy: Tensor) -> Tensor:
    """A loss in which every result has a weight of its own."""
    finite = torch.where(logprob > -float("inf"), logprob, 0)
    weight = torch.linspace(-1, 2, logprob.numel(), dtype=logprob.dtype).view_as(logprob)
    loss = (finite * weight).sum()
    return loss + entropy.square().sum() if entropy.requires_grad else loss


def logprobs(inputs: dict[str, Any], what: str, **more: Any) -> dict[str, Tensor]:
    """Results of linear_token_logprobs and the gradients of what trains, by name."""
    given, leaves = leaves_of(inputs, what)
    out = linear_token_logprobs(**given, **more)
    found = {k: x.detach() for k, x in out._asdict().items() if x is not None}
    if leaves:
        scalar(out.logprob_N, out.entropy_N).backward()
    return found | {name: leaf.grad for name, leaf in leaves.items()}


def own_loss(logprob: Tensor, entropy: Tensor, rows: slice) -> Tensor:
    return logprob.square() + 0.1 * entropy * rows.start


LOSSES: dict[str, dict[str, Any]] = {
    "ppo_clip": {"config": PolicyLossConfig(dual_clip=3.0)},
    "cispo": {"loss": "cispo", "entropy_coef": 0.0},
    "gspo": {"loss": "gspo", "entropy_coef": 0.0},
    "gspo with an entropy": {"loss": "gspo"},
    "a function": {"loss": own_loss},
}


def loss_inputs(name: str) -> dict[str, Any]:
    """Inputs of linear_policy_loss: a policy that has moved, one token of weight 0, and its NaN."""
    base = inputs_of("plain")
    logprob = linear_token_logprobs(**base).logprob_N
    weight = torch.full((N,), 1 / N, dtype=F64)
    weight[6] = 0
    base["hidden_ND"][6] = float("nan")
    return base | {
        "bias_V": _bias(),
        "behaviour_logprob_N": logprob + 0.3 * _random(21, N),
        "advantage_N": _random(22, N),
        "weight_N": weight,
        "ref_logprob_N": logprob - 0.1,
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
        "offsets": torch.tensor([0, 1, 7, N], dtype=torch.int32),
        **LOSSES[name],
    }


def losses(inputs: dict[str, Any], what: str, **more: Any) -> dict[str, Tensor]:
    """Results of linear_policy_loss, its metrics, and the gradients of what trains."""
    given, leaves = leaves_of(inputs, what)
    out = linear_policy_loss(**given, **more)
    found = {k: x.detach() for k, x in out._asdict().items() if isinstance(x, Tensor)}
    metrics = {name: getattr(out.metrics, name) for name in type(out.metrics)._fields}
    if leaves:
        (3 * out.loss).backward()
    return found | metrics | {name: leaf.grad for name, leaf in leaves.items()}


@contextmanager
def recorded() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """What a rank exchanges inside the block, in its order: the kind and the shape."""
    found: list[tuple[str, tuple[int, ...]]] = []
    before = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def recording(name: str) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            shapes = [tuple(x.shape) for x in args if isinstance(x, Tensor)]
            found.append((name, shapes[0]))
            return before[name](*args, **keywords)

        return call

    for name in before:
        setattr(dist, name, recording(name))
    yield found
    for name, function in before.items():
        setattr(dist, name, function)


def budget(sizes: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of logits of ROWS rows of the largest shard; those of 16-bit operands are float32."""
    return ROWS * max(sizes) * max(dtype.itemsize, 4)


def everything(group: Any, rank: int, sizes: tuple[int, ...]) -> dict[Any, Any]:
    """All cases of a share-out in one rank: results, and what was exchanged for them."""
    found: dict[Any, Any] = {}
    for kind, what in COMPUTED:
        more = {"group": group, "chunk_bytes": budget(sizes, DTYPES[kind])}
        for name in CASES:
            given = cut(inputs_of(name, DTYPES[kind]), sizes, rank)
            with recorded() as exchanged:
                found[kind, name, what] = logprobs(given, what, **more), exchanged
    more = {"group": group, "chunk_bytes": budget(sizes, F64)}
    for name in LOSSES:
        for what in LOSS_TRAINED:
            given = cut(loss_inputs(name), sizes, rank)
            with recorded() as exchanged:
                found["loss", name, what] = losses(given, what, **more), exchanged
    return found


def peak(group: Any, rank: int) -> int:
    """Bytes of one rank's tensors at their most, over what was there, of a step with a head."""
    n, words, size = 2048, 512, 16
    hidden = torch.randn(n, size, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = torch.randn(words, size).requires_grad_()
    token = torch.arange(n) % (2 * words)

    def step() -> None:
        out = linear_token_logprobs(hidden, weight, token, group=group, chunk_bytes=64 * words * 4)
        out.logprob_N.sum().backward()

    step()
    return peak_bytes(allocations(step))


def part(group: Any, rank: int) -> dict[str, Tensor]:
    """The gradient of the hidden states without its reduction, by what trains."""
    given = cut(inputs_of("plain"), (48, 49), rank)
    more = {"group": group, "reduce_hidden_grad": False}
    return {
        what: logprobs(given, what, **more)["hidden_ND"] for what in ("hidden states", "everything")
    }


def error_of(call: Callable[..., Any], **arguments: Any) -> str:
    """The message of what a call raises."""
    try:
        call(**arguments)
    except Exception as error:
        return str(error)
    raise AssertionError("nothing was raised")


def refused(group: Any, rank: int) -> dict[str, str]:
    """The errors of calls whose ranks do not agree, and of others that a group refuses."""
    given = cut(inputs_of("plain"), (48, 49), rank)
    hidden, token = given["hidden_ND"], given["token_N"]
    calls: dict[str, dict[str, Any]] = {
        "tokens": {"hidden_ND": hidden[: N - rank], "token_N": token[: N - rank]},
        "chunks": {"chunk_bytes": 100 + rank},
        "gradient": {"hidden_ND": hidden.clone().requires_grad_(rank == 0)},
        "values": {"token_N": token + rank, "check": True},
        "range": {"token_N": token + V, "check": True},
        "vocab_size": {"vocab_size": V + 1},
        "meta": {k: given[k].to("meta") for k in ("hidden_ND", "weight_VD", "token_N")},
    }
    return {
        name: error_of(linear_token_logprobs, **{**given, **change}, group=group)
        for name, change in calls.items()
    }


def compiled(group: Any, rank: int) -> dict[str, Any]:
    """What torch.compile makes of a call, and of one that is wrapped as the error says."""
    given = cut(inputs_of("plain"), (48, 49), rank)

    def function(op: Callable[..., Any]) -> Tensor:
        return op(**given, group=group).logprob_N + 1

    call = torch.compile(function, backend="eager")
    wrapped = torch.compiler.disable(linear_token_logprobs)
    return {
        "error": error_of(call, op=linear_token_logprobs),
        "wrapped": torch.equal(call(wrapped), function(linear_token_logprobs)),
    }


def data_parallel(group: Any, rank: int) -> dict[str, Any]:
    """A head that FSDP2 shards, and tokens of each rank's own: FSDP2's gradient, and ours."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = torch.nn.Linear(D, V, bias=False, dtype=F64)
    head = torch.nn.Linear(D, V, bias=False, dtype=F64)
    head.load_state_dict(whole.state_dict())
    fully_shard(head)
    hidden, token = _random(30 + rank, N, D), (_token() + rank) % V
    theirs = head(hidden).log_softmax(-1).gather(1, token[:, None]).sum()
    theirs.backward()
    found = {"theirs": head.weight.grad.full_tensor(), "weight": whole.weight.detach()}
    head.reshard()
    for reduce in ("mean", "sum"):
        head.weight.grad = None
        weight = gather_weight(head.weight, reduce=reduce)
        assert torch.equal(weight, whole.weight)
        out = linear_token_logprobs(hidden, weight, token)
        out.logprob_N.sum().backward()
        assert head.weight.grad.placements == head.weight.placements
        found[reduce] = head.weight.grad.full_tensor()
    found["own"] = torch.equal(out.logprob_N, linear_token_logprobs(hidden, whole.weight, token)[0])
    return found


def tensor_parallel(group: Any, rank: int) -> dict[str, Any]:
    """A head that is a DTensor sharded by vocabulary, its gradient, and what is refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(group),))
    given = inputs_of("plain")
    whole = given["weight_VD"]

    def shared_out(placement: Any) -> Any:
        return distribute_tensor(whole, mesh, [placement]).requires_grad_()

    weight = shared_out(Shard(0))
    hidden = given["hidden_ND"].clone().requires_grad_()
    arguments = given | {"hidden_ND": hidden, "weight_VD": weight}
    out = linear_token_logprobs(**arguments, group=mesh.get_group(), chunk_bytes=2000)
    scalar(out.logprob_N, out.entropy_N).backward()
    found = {
        "logprob_N": out.logprob_N.detach(),
        "entropy_N": out.entropy_N.detach(),
        "hidden_ND": hidden.grad,
        "weight_VD": weight.grad.full_tensor(),
    }
    calls: dict[str, dict[str, Any]] = {
        "no group": {},
        "replicated": {"group": mesh.get_group(), "weight_VD": shared_out(Replicate())},
        "by columns": {"group": mesh.get_group(), "weight_VD": shared_out(Shard(1))},
        "a mesh": {"group": mesh, "weight_VD": whole},
        "hidden states": {"hidden_ND": distribute_tensor(given["hidden_ND"], mesh, [Replicate()])},
    }
    errors = {
        name: error_of(linear_token_logprobs, **{**arguments, **change})
        for name, change in calls.items()
    }
    return {"results": found, "errors": errors}


def _rank(
    function: Callable[..., Any], rank: int, size: int, port: int, out: Path, args: Any
) -> None:
    torch.set_num_threads(1)
    as_process(rank, size, port)
    dist.init_process_group("gloo", timeout=timedelta(seconds=HANGS))
    torch.save(function(dist.group.WORLD, rank, *args), out / f"{rank}.pt")
    dist.destroy_process_group()


def on_ranks(function: Callable[..., Any], size: int, out: Path, *args: Any) -> list[Any]:
    """What `function(group, rank, *args)` returns in each of `size` processes over gloo."""
    port = free_port()
    processes = [
        runs.context.Process(target=_rank, args=(function, rank, size, port, out, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + HANGS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
    assert not late, "ranks wait for each other"
    assert [process.exitcode for process in processes] == [0] * size, "see what they said"
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(size)]
