"""Kept memory: written over when nobody has it, never while somebody does, and not for ever."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import policy_loss, token_logprobs, workspace
from tests.ops.oracle import few
from tests.ops.registry import OPS, Shape
from tests.tiers import interpreted

CPU = torch.device("cpu")
SIZE = (64, 8192)  # 2 MiB of float32


@pytest.fixture(autouse=True)
def _nothing_kept():
    workspace.release()
    yield
    workspace.release()


def fresh(size=SIZE, dtype=torch.float32):
    return workspace.fresh(size, dtype, CPU)


def test_freed_memory_is_reused():
    first = fresh()
    address = first.data_ptr()
    del first
    again = fresh((63, 8192), torch.float32)
    assert again.data_ptr() == address
    assert again.shape == (63, 8192)
    assert again.is_contiguous()


@pytest.mark.parametrize(
    "hold",
    [
        lambda x: x,
        lambda x: x[3:5],
        lambda x: x.detach(),
        lambda x: x.numpy(),
        torch.utils.dlpack.to_dlpack,
    ],
    ids=["itself", "a slice", "detached", "numpy", "dlpack"],
)
def test_memory_in_use_is_never_reused(hold):
    first = fresh()
    address, held = first.data_ptr(), hold(first)
    del first
    assert fresh().data_ptr() != address
    del held
    assert address in {x.data_ptr() for x in [fresh(), fresh()]}


def test_no_tensor_has_much_more_memory_than_it_shows():
    """Whoever saves one saves all of its memory."""
    fresh((256, 8192))
    assert fresh((64, 8192)).untyped_storage().nbytes() == 64 * 8192 * 4


def test_at_most_a_few_buffers_are_kept():
    kept = workspace.BUFFERS
    addresses = [x.data_ptr() for x in [fresh() for _ in range(2 * kept)]]
    found = {x.data_ptr() for x in [fresh() for _ in range(kept)]}
    assert found == set(addresses[kept:])


def test_small_and_very_large_memory_is_not_kept():
    for size in ((4, 16), (1 << 13, 1 << 14)):
        fresh(size)
        assert not workspace._kept


@pytest.mark.parametrize("op_name", ["policy_loss", "token_logprobs"])
@interpreted(lambda op_name: op_name == "token_logprobs")
def test_autograd_takes_the_buffer_that_was_kept(op_name, backend, monkeypatch):
    """No copy of N x V on the way to x.grad, and the next step's gradient where this one's was."""
    made = []
    kept = workspace.fresh

    def noted(*arguments):
        made.append((found := kept(*arguments)).data_ptr())
        return found

    monkeypatch.setattr(workspace, "fresh", noted)
    n = few(64, backend, 2)
    shape = Shape(n=n, vocab=8192 if n == 64 else workspace.SMALLEST // (4 * n))
    inputs = OPS[op_name].make_inputs(shape, torch.float32, 3)
    leaf = inputs.pop("logits_NV").requires_grad_()
    function = {"policy_loss": policy_loss, "token_logprobs": token_logprobs}[op_name]
    for _ in range(3):
        leaf.grad = None
        result = function(leaf, **inputs, backend=backend)
        (result.loss if op_name == "policy_loss" else result.logprob_N.sum()).backward()
        assert leaf.grad.data_ptr() == made[-1]
        del result
    assert len(made) == 3
    assert len(set(made)) == 1


def test_a_gradient_that_is_still_there_is_not_written_over():
    inputs = OPS["policy_loss"].make_inputs(Shape(n=64, vocab=8192), torch.float32, 3)
    leaf = inputs.pop("logits_NV").requires_grad_()
    policy_loss(leaf, **inputs).loss.backward()
    held, want = leaf.grad, leaf.grad.clone()
    leaf.grad = None
    for _ in range(3):
        policy_loss(leaf, **inputs).loss.backward()
    torch.testing.assert_close(held, want, rtol=0, atol=0)
    # accumulated by autograd into the gradient that is there
    torch.testing.assert_close(leaf.grad, 3 * want)


def test_nothing_kept_gives_new_memory_and_restores_the_buffers():
    address = fresh().data_ptr()
    with workspace.nothing_kept():
        inside = fresh()
        assert inside.data_ptr() != address
    del inside
    assert fresh().data_ptr() == address
