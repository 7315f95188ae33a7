"""A trained head's logits, kept in the memory of its gradient: what becomes of that memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import allocations, peak_bytes
from fastppo.ops import backend, linear_policy_loss, linear_token_logprobs, word_blocks
from tests.ops.oracle import check
from tests.ops.registry import OPS, Shape, even_offsets

pytestmark = [
    pytest.mark.skipif("native" not in backend.available("cpu"), reason="needs the C++ kernels"),
    pytest.mark.usefixtures("poisoned"),
]
SHAPE = Shape(n=70, vocab=331, hidden=128)
OP = OPS["linear_token_logprobs"]


def leaves_of(shape: Shape = SHAPE, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    inputs: dict[str, Any] = OP.make_inputs(shape, dtype, 0)
    inputs["token_N"][3] = -100
    for name in ("hidden_ND", "weight_VD"):
        inputs[name].requires_grad_()
    return {**inputs, "entropy_grad": True, "chunk_bytes": 1 << 15}


def loss_of(inputs: dict[str, Any], **more: Any) -> Tensor:
    found = linear_token_logprobs(**{**inputs, **more}, backend="native")
    up_N = torch.linspace(-1, 2, found.logprob_N.shape[0])
    return ((found.logprob_N + 0.3 * found.entropy_N) * up_N).sum()


def gradients(inputs: dict[str, Any], **more: Any) -> list[Tensor]:
    return list(
        torch.autograd.grad(loss_of(inputs, **more), (inputs["hidden_ND"], inputs["weight_VD"]))
    )


def right(inputs: dict[str, Any]) -> list[Tensor]:
    """Without what is tested here: the logits are computed twice."""
    return gradients(inputs, keep_logits=False)


def saved(call: Callable[[], Any]) -> list[Tensor]:
    """What autograd saves of a call."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        call()
    return kept


def are_kept(call: Callable[[], Any], shape: Shape) -> bool:
    """Whether a call saves memory of the size of the weight's gradient beside the weight."""
    sizes = [x.numel() for x in saved(call)]
    return sizes.count(shape.vocab * shape.hidden) == 2


def test_the_weights_gradient_has_the_same_bits():
    """That of the hidden states is added up from the other end."""
    inputs = leaves_of()
    hidden, weight = gradients(inputs)
    same_hidden, same_weight = right(inputs)
    assert torch.equal(weight, same_weight)
    torch.testing.assert_close(hidden, same_hidden, atol=1e-6, rtol=1e-5)


def test_a_second_backward_gives_the_same_and_leaves_the_first_alone():
    inputs = leaves_of()
    leaves = (inputs["hidden_ND"], inputs["weight_VD"])
    loss = loss_of(inputs)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [x.clone() for x in first]
    first[1].mul_(1.0)  # in place, as an optimiser or a clip by norm may
    second = torch.autograd.grad(loss, leaves)
    for mine, copy, again in zip(first, copies, second, strict=True):
        assert torch.equal(mine, copy)
        torch.testing.assert_close(again, copy, atol=1e-6, rtol=1e-5)


def test_gradients_add_up_over_calls_and_backwards():
    """The first gradient becomes `weight.grad`, to which the others are added in place."""
    inputs = leaves_of()
    loss = loss_of(inputs)
    loss.backward(retain_graph=True)
    loss.backward()
    loss_of(inputs).backward()
    for name, once in zip(("hidden_ND", "weight_VD"), right(inputs), strict=True):
        torch.testing.assert_close(inputs[name].grad, 3 * once, atol=1e-5, rtol=1e-5)


def test_calls_that_wait_for_one_backward_do_not_share_memory():
    inputs = leaves_of()
    sum(loss_of(inputs) for _ in range(3)).backward()
    for name, once in zip(("hidden_ND", "weight_VD"), right(inputs), strict=True):
        torch.testing.assert_close(inputs[name].grad, 3 * once, atol=1e-5, rtol=1e-5)


def test_a_gradient_of_the_hidden_states_alone_leaves_the_logits_where_they_are():
    inputs = leaves_of()
    loss = loss_of(inputs)
    hidden, weight = right(inputs)
    for _ in range(2):
        (alone,) = torch.autograd.grad(loss, inputs["hidden_ND"], retain_graph=True)
        torch.testing.assert_close(alone, hidden, atol=1e-6, rtol=1e-5)
    (after,) = torch.autograd.grad(loss, inputs["weight_VD"])
    assert torch.equal(after, weight)


def test_the_forward_alone_changes_nothing_of_the_next_call():
    inputs = leaves_of()
    loss_of(inputs)
    assert torch.equal(gradients(inputs)[1], right(inputs)[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_it_gives_the_same(reentrant):
    inputs = leaves_of()

    def call(hidden: Tensor) -> Tensor:
        return loss_of({**inputs, "hidden_ND": hidden})

    checkpoint(call, inputs["hidden_ND"], use_reentrant=reentrant).backward()
    hidden, weight = right(inputs)
    assert torch.equal(inputs["weight_VD"].grad, weight)
    torch.testing.assert_close(inputs["hidden_ND"].grad, hidden, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("unpack", ["a copy", "the same one"])
def test_under_hooks_that_move_what_is_saved_it_gives_the_same(unpack):
    """Also where every backward is given the first one's tensor, written over by then."""
    inputs, clone = leaves_of(), unpack == "a copy"
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.clone(), lambda x: x.clone() if clone else x
    ):
        loss = loss_of(inputs)
    for _ in range(2):
        found = torch.autograd.grad(
            loss, (inputs["hidden_ND"], inputs["weight_VD"]), retain_graph=True
        )
        for mine, own in zip(found, right(inputs), strict=True):
            torch.testing.assert_close(mine, own, atol=1e-6, rtol=1e-5)


# 2,048 tokens are the most that go over the words at a time; 2,064 columns need as many numbers.
LONG = Shape(n=2048, vocab=67, hidden=2064)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        (SHAPE, True),
        (Shape(n=96, vocab=331, hidden=112), True),
        (Shape(n=97, vocab=331, hidden=112), False),
        (Shape(n=63, vocab=331, hidden=112), False),
        (LONG, True),
        (Shape(n=2049, vocab=67, hidden=4096), False),
    ],
    ids=lambda x: f"{x.n} of {x.hidden}" if isinstance(x, Shape) else "",
)
def test_they_are_kept_where_they_fit(shape, kept):
    inputs = leaves_of(shape)
    assert are_kept(lambda: loss_of(inputs), shape) == kept
    assert not are_kept(lambda: loss_of(inputs, keep_logits=False), shape)
    hidden, weight = gradients(inputs)
    same_hidden, same_weight = right(inputs)
    torch.testing.assert_close(weight, same_weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden, same_hidden, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trains", [{}, {"hidden_ND"}, {"weight_VD"}], ids=str)
def test_they_are_kept_where_the_weight_trains(trains):
    inputs = leaves_of()
    for name in ("hidden_ND", "weight_VD"):
        inputs[name].requires_grad_(name in trains)
    sizes = [x.numel() for x in saved(lambda: loss_of(inputs))]
    assert (SHAPE.vocab * SHAPE.hidden in sizes) == ("weight_VD" in trains)


def test_without_gradient_nothing_is_kept():
    inputs = leaves_of()
    with torch.no_grad():
        assert not saved(lambda: loss_of(inputs))


NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("size", [64, 224], ids=["made again", "kept"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_in_16_bits_it_obeys_the_rule(isa, monkeypatch, dtype, size, entropy_grad):
    """In one block and in several: the hidden states' gradient is rounded once for each."""
    shape = Shape(n=70, vocab=2331, hidden=size)
    inputs = OP.make_inputs(shape, dtype, 0)
    inputs["token_N"][3] = -100
    inputs |= {"temperature": 0.7, "softcap": 4.0, "entropy_grad": entropy_grad}
    op = replace(OP, differentiable=("hidden_ND", "weight_VD"))
    for budget in (1 << 24, 1 << 17):
        monkeypatch.setattr(word_blocks, "_BYTES", budget)
        check(op, inputs, "native")


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("size", [64, 224], ids=["made again", "kept"])
def test_logits_of_16_bits_are_rounded_as_those_of_chunks_of_rows(dtype, size):
    inputs = leaves_of(Shape(n=70, vocab=2331, hidden=size), dtype)
    inputs["logits_dtype"] = dtype
    ours = linear_token_logprobs(**inputs, backend="native").logprob_N
    rows = linear_token_logprobs(**inputs, backend="torch").logprob_N
    torch.testing.assert_close(ours, rows, atol=1e-5, rtol=1e-5)
    up_N = torch.linspace(-1, 2, 70)
    leaves = (inputs["hidden_ND"], inputs["weight_VD"])
    for mine, own in zip(
        *(torch.autograd.grad(made, leaves, up_N) for made in (ours, rows)), strict=True
    ):
        assert mine.dtype == dtype
        eps = torch.finfo(dtype).eps
        assert (mine.float() - own.float()).abs().max() <= 2 * eps * own.float().abs().max()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("size", "kept"), [(224, True), (223, False)])
def test_in_16_bits_they_need_twice_the_room(dtype, size, kept):
    shape = Shape(n=96, vocab=331, hidden=size)
    inputs = leaves_of(shape, dtype)
    assert are_kept(lambda: loss_of(inputs), shape) == kept
    for mine, own in zip(gradients(inputs), right(inputs), strict=True):
        error = (mine.float() - own.float()).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * own.float().abs().max()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_in_16_bits_more_tokens_than_go_at_a_time_go_by_rows(dtype):
    """Else a row of the weight's gradient would be rounded once for each part of them."""
    shape = Shape(n=2049, vocab=67, hidden=16)
    inputs = leaves_of(shape, dtype) | {"chunk_bytes": None}
    words, rows = (
        torch.autograd.grad(
            linear_token_logprobs(**inputs, backend=on).logprob_N.sum(), inputs["weight_VD"]
        )[0]
        for on in ("native", "torch")
    )
    assert (words.float() - rows.float()).abs().max() <= torch.finfo(dtype).eps * rows.abs().max()


@pytest.mark.parametrize("logits", ["float32", "of 16 bits"])
def test_in_16_bits_its_memory_is_that_of_the_weights_gradient_and_a_block(logits):
    """Not a float32 copy of it, which is twice as much."""
    shape = Shape(n=256, vocab=20000, hidden=288)
    inputs = leaves_of(shape, torch.bfloat16) | {"chunk_bytes": 1 << 20}
    if logits != "float32":
        inputs["logits_dtype"] = torch.bfloat16
    gradient = shape.vocab * shape.hidden * 2
    small = (3 << 20) // 2 + 1024 * shape.hidden * 4 + 200 * shape.n * 8 + 16 * shape.n * 288 * 4

    def whole() -> None:
        inputs["hidden_ND"].grad = inputs["weight_VD"].grad = None
        loss_of(inputs).backward()

    # With AMX, oneDNN lays out the matrices of 16-bit products anew, in memory of its own.
    with torch.backends.mkldnn.flags(enabled=False):
        whole()
        assert gradient < peak_bytes(allocations(whole)) < gradient + small


@pytest.mark.parametrize("keep", [True, False])
def test_its_memory_is_that_of_the_weights_gradient_from_the_forward_on(keep):
    """A copy of the gradient, or one beside the logits, would be as much again."""
    shape = Shape(n=256, vocab=20000, hidden=288)
    inputs = leaves_of(shape)
    inputs |= {"chunk_bytes": 1 << 20, "keep_logits": keep}
    gradient = shape.vocab * shape.hidden * 4
    small = (1 << 20) + 200 * shape.n * 8 + 8 * shape.n * shape.hidden * 4

    def whole() -> None:
        inputs["hidden_ND"].grad = inputs["weight_VD"].grad = None
        loss_of(inputs).backward()

    whole()
    assert gradient < peak_bytes(allocations(whole)) < gradient + small
    inputs["hidden_ND"].grad = inputs["weight_VD"].grad = None
    waiting = peak_bytes(allocations(lambda: loss_of(inputs)))
    assert gradient * keep <= waiting < gradient * keep + small


LOSS = OPS["linear_policy_loss"]


def loss_inputs(trains: tuple[str, ...], **more: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = LOSS.make_inputs(SHAPE, torch.float32, 0)
    inputs["token_N"][3] = -100
    inputs["weight_N"][5] = 0.0
    inputs["hidden_ND"][5] = float("nan")
    inputs["offsets"] = even_offsets(SHAPE)
    for name in trains:
        inputs[name].requires_grad_()
    return {**inputs, **more}


@pytest.mark.parametrize("trains", [("hidden_ND", "weight_VD"), ("weight_VD",)], ids=str)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("name", ["ppo_clip", "cispo", "gspo"])
def test_a_loss_with_a_trained_head_is_the_definitions(name, entropy_coef, trains):
    """Loss, log-probs, KL, gradients and every metric; rows of weight 0 hold what is not finite."""

    def run(backend: str) -> list[Tensor]:
        more = {"loss": name, "entropy_coef": entropy_coef, "grad_scale": 8.0}
        inputs = loss_inputs(trains, **more)
        made = linear_policy_loss(**inputs, backend=backend, chunk_bytes=1 << 15)
        grads = torch.autograd.grad(made.loss, [inputs[name] for name in trains])
        values = [made.loss.detach(), made.logprob_N, made.entropy_N, made.kl_N, *grads]
        return [*values, *(getattr(made.metrics, key) for key in made.metrics._fields)]

    for mine, own in zip(run("native"), run("torch"), strict=True):
        torch.testing.assert_close(mine, own, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("size", [64, 224], ids=["made again", "kept"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", ["ppo_clip", "gspo"])
def test_in_16_bits_a_loss_with_a_trained_head_is_the_definitions(name, dtype, size):
    shape = Shape(n=96, vocab=2331, hidden=size)
    inputs: dict[str, Any] = LOSS.make_inputs(shape, dtype, 0)
    inputs |= {"loss": name, "offsets": even_offsets(shape), "entropy_coef": 0.01}
    leaves = [inputs[key].requires_grad_() for key in ("hidden_ND", "weight_VD")]
    found = []
    for on in ("native", "torch"):
        made = linear_policy_loss(**inputs, backend=on)
        found.append((made.loss.detach(), *torch.autograd.grad(made.loss, leaves)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    for mine, own in zip(found[0][1:], found[1][1:], strict=True):
        assert mine.dtype == dtype
        error = (mine.float() - own.float()).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * own.float().abs().max()


@pytest.mark.parametrize(
    ("dtype", "size", "own"),
    [
        (torch.float32, 288, False),
        (torch.float32, 288, True),
        (torch.bfloat16, 288, False),
        (torch.bfloat16, 576, False),
    ],
    ids=["float32", "a loss of the caller's", "bfloat16, made again", "bfloat16, kept"],
)
def test_the_memory_of_a_loss_with_a_trained_head(dtype, size, own):
    """The gradient and a block; a loss of the caller's own goes by chunks of rows."""
    shape = Shape(n=256, vocab=20000, hidden=size)
    inputs: dict[str, Any] = LOSS.make_inputs(shape, dtype, 0)
    inputs["hidden_ND"].requires_grad_()
    inputs["weight_VD"].requires_grad_()
    rest = {"chunk_bytes": 1 << 20, "backend": "native"}
    if own:
        rest["loss"] = lambda logprob_n, entropy_n, rows: -logprob_n
    gradient = shape.vocab * size * dtype.itemsize
    small = (1 << 20) + 200 * shape.n * 8 + 8 * shape.n * size * 4
    if dtype != torch.float32:
        small += (1 << 19) + 1024 * size * 4 + 8 * shape.n * size * 4
    call = lambda: linear_policy_loss(**inputs, **rest).loss  # noqa: E731
    with torch.backends.mkldnn.flags(enabled=False):
        call()
        assert gradient < peak_bytes(allocations(call)) < gradient + small
