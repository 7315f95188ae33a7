"""The order of copies and events, seen through streams whose copies run as late as they may."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fastppo.offload.activations import ActivationOffload
from fastppo.offload.streams import DeviceStreams
from tests.offload.tools import LAYERS, LateStreams, gradients, ids, llama, loss_of, same

MOVING = ["offload", "checkpoint+offload"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return llama()


@pytest.fixture(scope="module")
def plain(model):
    loss_of(model, ids()).backward()
    return gradients(model)


def offload(model, mode, streams, **settings):
    return ActivationOffload(
        model, mode, **{"min_bytes": 0, "keep_last": 0} | settings, streams=streams
    )


def step(model, context):
    with context:
        loss = loss_of(model, ids())
    loss.backward()
    return gradients(model)


@pytest.mark.parametrize("mode", MOVING)
@pytest.mark.parametrize("in_flight", [0, 1, 2, 100])
def test_results_are_the_same_if_copies_run_as_late_as_events_allow(model, plain, mode, in_flight):
    streams = LateStreams()
    context = offload(model, mode, streams, in_flight=in_flight)
    for _ in range(3):
        assert same(plain, step(model, context))
    assert streams.log
    assert not streams.broken
    assert not streams.pending()


@pytest.mark.parametrize("mode", MOVING)
def test_a_graph_that_is_freed_waits_for_the_copies_of_its_memory(model, plain, mode):
    streams = LateStreams()
    context = offload(model, mode, streams)
    with context:
        loss_of(model, ids())
    assert not streams.broken
    assert not streams.pending()
    assert same(plain, step(model, context))


class Hasty(LateStreams):
    """Streams that forget to wait, for what is sent out or for what comes back."""

    def wait(self, event):
        self.log.append(("wait", event))


@pytest.mark.parametrize("mode", MOVING)
def test_the_recorder_detects_a_missing_wait(model, plain, mode):
    assert not same(plain, step(model, offload(model, mode, Hasty())))


def logged(model, streams, mode="checkpoint+offload", **settings):
    """The log of one step, in its middle of the layers' runs: ('run', i), copies, waits, events."""
    context = offload(model, mode, streams, **settings)
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda *_, i=i: streams.log.append(("run", i)),
        )
        for i, layer in enumerate(context.layers)
    ]
    with context:
        loss = loss_of(model, ids())
    streams.log.append(("backward", None))
    loss.backward()
    gradients(model)
    for hook in hooks:
        hook.remove()
    return streams.log


def test_a_layers_input_is_offloaded_after_it_is_computed_and_before_the_layer_runs(model):
    log = logged(model, LateStreams())
    forward = log[: log.index(("backward", None))]
    kinds = [kind for kind, _ in forward if kind != "wait"]
    assert kinds == ["record", "copy", "run"] * LAYERS
    for (kind, event), (_, numbers) in itertools.pairwise(forward):
        if kind == "record":
            assert numbers[1] == event  # the copy waits for the event taken just before it


def test_compute_waits_for_the_oldest_of_two_on_their_way_out(model):
    log = logged(model, LateStreams(), in_flight=2)
    forward = log[: log.index(("backward", None))]
    copies = [numbers[0] for kind, numbers in forward if kind == "copy"]
    waits = [event for kind, event in forward if kind == "wait"]
    assert waits == copies[: LAYERS - 2]
    # Before the third layer runs its input's copy is asked for, and the first one's is over.
    assert forward.index(("wait", copies[0])) < forward.index(("run", 2))


def test_the_next_layer_is_on_its_way_before_this_one_runs_again(model):
    log = logged(model, LateStreams(), in_flight=0)
    backward = log[log.index(("backward", None)) + 1 :]
    kinds = [kind for kind, _ in backward]
    # The last layer's input and the one before it; wait for the first of the two; run. From then
    # on a layer finds its own input there, asks for the next, and waits for nothing but its own.
    assert kinds[:6] == ["record", "copy", "record", "copy", "wait", "run"]
    assert kinds[6:] == ["record", "copy", "wait", "run"] * (LAYERS - 2) + ["wait", "run"]
    copies = [numbers[0] for kind, numbers in backward if kind == "copy"]
    waits = [event for kind, event in backward if kind == "wait"]
    assert waits == copies
    assert [i for kind, i in backward if kind == "run"] == list(range(LAYERS - 1, -1, -1))


def test_layers_that_stay_prefetch_the_previous_layer(model):
    log = logged(model, LateStreams(), in_flight=0, keep_last=1)
    backward = log[log.index(("backward", None)) + 1 :]
    assert [kind for kind, _ in backward][:3] == ["record", "copy", "run"]


def test_without_checkpointing_a_layers_tensors_come_together(model):
    log = logged(model, LateStreams(), mode="offload", in_flight=0)
    backward = log[log.index(("backward", None)) + 1 :]
    kinds = [kind for kind, _ in backward]
    first_wait = kinds.index("wait")
    per_layer = kinds.count("copy") / LAYERS
    assert kinds[:first_wait].count("copy") == pytest.approx(2 * per_layer, abs=2)


def test_a_host_buffer_is_written_again_only_behind_its_last_copy(model):
    """Copies run in the order asked for, so a buffer's next writer comes after its last reader."""
    streams = LateStreams()
    context = offload(model, "checkpoint+offload", streams, in_flight=0)
    step(model, context)
    first = len(streams.log)
    step(model, context)
    numbers = [event[0] for kind, event in streams.log if kind == "copy"]
    assert numbers == sorted(numbers)
    (tensors,) = context._host_tensors.values()
    assert tensors.ring.buffers == LAYERS
    assert first < len(streams.log)


def test_the_streams_of_a_device_speak_pytorchs_interface(model, plain):
    """Against torch.cpu, which stands in for torch.cuda: every name that they call exists."""
    streams = DeviceStreams(torch.device("cpu"))
    assert same(plain, step(model, offload(model, "checkpoint+offload", streams)))
