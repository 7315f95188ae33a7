"""Activation offloading: the same gradients to the bit, less on the device, nothing left behind."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from fastppo.errors import UserError
from fastppo.models.batch import Budget, batches, make_batch
from fastppo.offload.activations import ActivationOffload, find_layers
from fastppo.offload.host_tensors import HostTensors, LayerGroup
from fastppo.ops import linear_policy_loss
from fastppo.ppo.update import Totals, forward_backward, mini_batches
from tests.offload.tools import (
    HIDDEN,
    INPUT_BYTES,
    LAYERS,
    Live,
    gradients,
    ids,
    llama,
    loss_of,
    same,
)

MODES = ["checkpoint", "offload", "checkpoint+offload"]
MOVING = MODES[1:]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return llama()


@pytest.fixture(scope="module")
def plain(model: nn.Module) -> dict[str, torch.Tensor]:
    loss_of(model, ids()).backward()
    return gradients(model)


def offload(model: nn.Module, mode: str, **settings: Any) -> ActivationOffload:
    return ActivationOffload(model, mode, **{"min_bytes": 0, **settings})


def step(model: nn.Module, context: ActivationOffload, seed: int = 0) -> dict[str, torch.Tensor]:
    with context:
        loss = loss_of(model, ids(seed))
    loss.backward()
    return gradients(model)


def idle(context: ActivationOffload) -> bool:
    """Every host buffer is back in its ring, and no record is known any more.

    Without collecting garbage: what is kept alive by a cycle is a leak until somebody does.
    """
    offloaded = list(context._host_tensors.values())
    return all(len(s.ring.free) == s.ring.buffers and not s._of_storage for s in offloaded)


@pytest.mark.parametrize("mode", ["none", *MODES])
@pytest.mark.parametrize("keep_last", [0, 1, LAYERS])
def test_gradients_are_the_same_to_the_bit(model, plain, mode, keep_last):
    context = offload(model, mode, keep_last=keep_last)
    assert same(plain, step(model, context))
    assert idle(context)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_same_under_autocast(model, mode):
    found = []
    for context in (offload(model, "none"), offload(model, mode)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(step(model, context))
    assert same(*found)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_whole_weights_are_the_same(mode):
    whole = llama(2, lora=False)
    assert same(step(whole, offload(whole, "none")), step(whole, offload(whole, mode)))


@pytest.mark.parametrize("mode", MODES)
def test_dropout_is_replayed(mode):
    dropping = llama(2, attention_dropout=0.5)
    found = []
    for chosen in ("none", mode):
        torch.manual_seed(1)
        found.append(step(dropping, offload(dropping, chosen)))
    assert same(*found)


@pytest.mark.parametrize("critic", ["adapter", "shared"])
@pytest.mark.parametrize("mode", MODES)
def test_a_ppo_update_has_the_same_gradients(
    tiny_roles, config, rollout, experience_of, critic, mode
):
    """Both critic kinds, micro-batches of 3 and 1, a role's backward before the next role."""
    settings = config(critic=critic)
    made = tiny_roles(critic=critic)
    experience = experience_of(made, rollout, settings)
    (mini,) = mini_batches(experience, settings, seed=0)
    found = []
    for chosen in ("none", mode):
        made.model.train()
        made.model.zero_grad(set_to_none=True)
        made.critic_head.zero_grad(set_to_none=True)
        with offload(made.base, chosen, keep_last=0) as context:
            for batch in batches(rollout, mini.rows, Budget(rows=3)):
                forward_backward(made, experience, batch, mini, settings, Totals())
        trained = [*made.trainable_parameters("actor"), *made.trainable_parameters("critic")]
        found.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    assert found[0].any()
    assert torch.equal(*found)
    assert (context.bytes_out > 0) == (mode in MOVING)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", [("actor", "critic"), ("critic", "actor")])
def test_a_layer_is_recomputed_with_the_adapter_it_ran_with(tiny_roles, rollout, mode, order):
    made = tiny_roles(critic="adapter")
    batch = make_batch(rollout, range(4))
    found = []
    for chosen in ("none", mode):
        with offload(made.base, chosen):
            for role in order:
                with made.use(role):
                    made.hidden(batch.input_ids_BT, batch.mask_BT).square().sum().backward()
        found.append(gradients(made.model))
    assert same(*found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("turned", [False, True])
def test_two_forwards_before_their_backwards(model, mode, turned):
    found = []
    for chosen in ("none", mode):
        with offload(model, chosen) as context:
            losses = [loss_of(model, ids(seed)) for seed in (0, 1)]
        for loss in reversed(losses) if turned else losses:
            loss.backward()
        found.append(gradients(model))
        del losses, loss
        assert idle(context)
    assert same(*found)


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_may_be_walked_twice(model, plain, mode):
    with offload(model, mode, keep_last=0) as context:
        loss = loss_of(model, ids())
    loss.backward(retain_graph=True)
    assert same(plain, gradients(model))
    loss.backward()
    assert same(plain, gradients(model))
    del loss
    assert idle(context)


@pytest.mark.parametrize("mode", MODES)
def test_nested_contexts_act_once(model, plain, mode):
    context = offload(model, mode, keep_last=0)
    with context:
        assert same(plain, step(model, context))
        once = context.bytes_out
        with offload(model, "checkpoint") as other:
            assert same(plain, step(model, other))
        assert context.bytes_out == once
        assert same(plain, step(model, context))
    assert context.bytes_out == 2 * once
    assert all("forward" not in layer.__dict__ for layer in context.layers)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_within_a_layer_is_left_alone(model, plain, mode):
    layers = list(find_layers(model))
    context = offload(model, mode, layers=[layers[1].mlp, *layers], keep_last=0)
    assert same(plain, step(model, context))
    assert idle(context)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_happens_without_gradients(model, mode):
    context = offload(model, mode)
    with torch.no_grad():
        expected = loss_of(model, ids())
        with context:
            assert torch.equal(loss_of(model, ids()), expected)
    assert not context._host_tensors


@pytest.mark.parametrize("mode", MODES)
def test_layers_below_the_lowest_trained_one_stay_out_of_it(mode):
    partly = llama(4)
    for name, parameter in partly.named_parameters():
        parameter.requires_grad_("lora_" in name and ".layers.3." in name)
    calls = []
    for layer in find_layers(partly):
        # Before and not after: recomputation stops early, within the last module of the layer.
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    context = offload(partly, mode, keep_last=0)
    step(partly, context)
    assert len(calls) == 4 + mode.startswith("checkpoint")
    if mode == "checkpoint+offload":
        assert context.bytes_out == INPUT_BYTES


def fail_in(layer: nn.Module) -> Any:
    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    return layer.mlp.down_proj.register_forward_pre_hook(fail)


@pytest.mark.parametrize("mode", MODES)
def test_a_failed_forward_leaves_nothing(model, plain, mode):
    context = offload(model, mode, keep_last=0)
    step(model, context)
    hook = fail_in(context.layers[2])
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            step(model, context)
    finally:
        hook.remove()
    assert all("forward" not in layer.__dict__ for layer in context.layers)
    assert idle(context)
    before = context.host_bytes
    assert same(plain, step(model, context))
    assert context.host_bytes == before


@pytest.mark.parametrize("mode", MODES)
def test_a_failed_backward_leaves_nothing(model, plain, mode):
    context = offload(model, mode, keep_last=0)
    with context:
        hook = context.layers[2].mlp.register_full_backward_hook(lambda *_: 1 / 0)
        loss = loss_of(model, ids())
    hook.remove()
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    del loss
    gradients(model)
    assert idle(context)
    assert same(plain, step(model, context))


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_without_a_backward_leaves_nothing(model, plain, mode):
    context = offload(model, mode, keep_last=0)
    with context:
        loss_of(model, ids())
    assert idle(context)
    assert same(plain, step(model, context))


def test_every_layers_input_is_moved_once(model):
    """layers x tokens x hidden x itemsize, out; back without what is still leaving."""
    for keep_last, in_flight in ((0, 2), (1, 2), (2, 0)):
        context = offload(model, "checkpoint+offload", keep_last=keep_last, in_flight=in_flight)
        step(model, context)
        assert context.bytes_out == (LAYERS - keep_last) * INPUT_BYTES
        assert context.bytes_back == (LAYERS - keep_last - in_flight) * INPUT_BYTES


def test_bf16_inputs_move_in_two_bytes():
    half = llama(3).bfloat16()
    context = offload(half, "checkpoint+offload", keep_last=0)
    step(half, context)
    assert context.bytes_out == 3 * INPUT_BYTES // 2


class ByKeyword(nn.Module):
    """A model that hands its layers the hidden states as a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(input=x).tanh()
        return x


def test_inputs_that_come_as_keywords_move_too():
    module = ByKeyword()
    x = torch.randn(4, HIDDEN, requires_grad=True)
    with offload(module, "checkpoint+offload", keep_last=0) as context:
        module(x).sum().backward()
    assert context.bytes_out == 3 * x.numel() * 4


def held_after_forward(model: nn.Module, context: ActivationOffload) -> tuple[int, int]:
    """Bytes that wait for the backward, and the most there were at a time in a whole step."""
    step(model, context)  # the host buffers exist from here on, and are no part of the count
    with Live() as live, context:
        loss = loss_of(model, ids())
    held = live.nbytes()
    with live:
        loss.backward()
    gradients(model)
    return held, live.peak


def test_saved_bytes_fall_as_the_modes_promise(model):
    held, peak = {}, {}
    for mode in ("none", *MODES):
        context = offload(model, mode, keep_last=1, in_flight=1)
        held[mode], peak[mode] = held_after_forward(model, context)
    # Of five inputs one is kept and one is still leaving.
    assert held["checkpoint"] - held["checkpoint+offload"] == (LAYERS - 2) * INPUT_BYTES
    # Of what five layers save, one layer's is kept; the rest of `none` is the head and the norm.
    one_layer = (held["none"] - held["checkpoint"]) / LAYERS
    gone = held["none"] - held["offload"]
    assert (LAYERS - 1) * 0.8 * one_layer < gone < LAYERS * one_layer
    assert peak["checkpoint+offload"] < peak["checkpoint"] < peak["none"]
    assert peak["offload"] < peak["none"]


@pytest.mark.parametrize("mode", MOVING)
def test_the_ring_never_grows_after_the_first_step(model, mode, monkeypatch):
    context = offload(model, mode, keep_last=0)
    gc.disable()  # buffers come back by themselves, not when cycles are collected
    try:
        step(model, context)
        (tensors,) = context._host_tensors.values()
        buffers, nbytes = tensors.ring.buffers, context.host_bytes
        monkeypatch.setattr(tensors.ring.memory, "empty", None)
        for seed in range(3):
            step(model, context, seed)
        with context:
            loss_of(model, ids(3, tokens=7)).backward()
    finally:
        gc.enable()
    assert (tensors.ring.buffers, context.host_bytes) == (buffers, nbytes)


def test_longer_batches_put_their_buffers_in_the_place_of_shorter_ones(model):
    context = offload(model, "checkpoint+offload", keep_last=0)
    for tokens in (3, 6, 12, 24, 48):
        with context:
            loss_of(model, ids(tokens=tokens)).backward()
    (tensors,) = context._host_tensors.values()
    assert tensors.ring.buffers == LAYERS
    assert context.host_bytes < 2 * LAYERS * 4 * INPUT_BYTES
    gradients(model)


def test_parameters_stay_and_a_storage_moves_once(model, monkeypatch):
    seen: list[int] = []
    original = HostTensors.offload

    def spy(self: HostTensors, tensor: torch.Tensor, group: Any, *, keep: bool = False) -> Any:
        seen.append(tensor.untyped_storage().data_ptr())
        return original(self, tensor, group, keep=keep)

    monkeypatch.setattr(HostTensors, "offload", spy)
    context = offload(model, "offload", keep_last=0, in_flight=10_000)  # nothing is freed meanwhile
    with context:
        loss = loss_of(model, ids())
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    assert not own & set(seen)
    (tensors,) = context._host_tensors.values()
    assert tensors.ring.buffers == len(set(seen)) < len(seen)
    loss.backward()
    gradients(model)


@pytest.mark.parametrize("mode", MOVING)
def test_the_fused_losss_buffers_stay_where_they_are(model, mode):
    base = model.get_base_model()
    with offload(model, mode) as context:
        hidden_ND = base.model(input_ids=ids(), use_cache=False).last_hidden_state.flatten(0, 1)
        moved = context.bytes_out
        n = len(hidden_ND)
        loss = linear_policy_loss(
            hidden_ND,
            base.lm_head.weight,
            ids().flatten(),
            torch.full((n,), -4.0),
            torch.linspace(-1, 1, n),
            torch.full((n,), 1 / n),
            chunk_bytes=1 << 10,
        ).loss
        assert context.bytes_out == moved > 0
        assert all(type(saved) is torch.Tensor for saved in _saved_by(loss.grad_fn))
    loss.backward()
    gradients(model)


def _saved_by(node: Any) -> list[Any]:
    return [saved for saved in node.saved_tensors if saved is not None]


def test_a_tensor_modified_while_it_leaves_is_an_error():
    class Inplace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                y = layer(x)
                with torch.no_grad():
                    x.mul_(2)
                x = y
            return x

    module = Inplace()
    with (
        pytest.raises(RuntimeError, match="modified in place"),
        offload(module, "checkpoint+offload", in_flight=1, keep_last=0),
    ):
        module(torch.randn(4, HIDDEN)).sum().backward()


def test_a_storage_that_changed_moves_anew():
    tensors = HostTensors(torch.device("cpu"), in_flight=0)
    x = torch.ones(8)
    first = tensors.offload(x, LayerGroup())
    x.add_(1)
    second = tensors.offload(x, LayerGroup())
    assert (first.get().tolist(), second.get().tolist()) == ([1.0] * 8, [2.0] * 8)


def test_views_of_a_storage_share_what_comes_back():
    """Strides, offsets and broadcasting as they were; one copy a backward, however many read it."""
    tensors = HostTensors(torch.device("cpu"), in_flight=0)
    x = torch.arange(12.0).view(3, 4)
    views = [x, x.T, x[1:, ::2], x[0].expand(5, 4)]
    group = LayerGroup()
    handles = [tensors.offload(view, group) for view in views]
    for passes in (1, 2):
        for handle, view in zip(handles, views, strict=True):
            back = handle.get()
            assert torch.equal(back, view)
            assert (back.stride(), back.storage_offset()) == (view.stride(), view.storage_offset())
            assert back.data_ptr() != view.data_ptr()
        assert tensors.bytes_back == passes * 12 * 4
    assert tensors.bytes_out == 12 * 4


def test_offload_dir_leaves_no_file(model, plain, tmp_path):
    folder = tmp_path / "spill"
    context = offload(model, "checkpoint+offload", offload_dir=folder, keep_last=0)
    assert same(plain, step(model, context))
    assert context.host_bytes > 0
    assert not list(folder.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"offload_dir.*name a folder"):
        step(model, offload(model, "checkpoint+offload", offload_dir=tmp_path / "file"))
