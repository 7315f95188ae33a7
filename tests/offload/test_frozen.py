"""Streamed frozen models: the same outputs, two layers on the device, the next one on its way."""

from __future__ import annotations

import pytest
import torch

from fastppo.offload.frozen import place_frozen, stream
from fastppo.offload.streams import HostMemory
from tests.offload.tools import LateStreams, ids, llama

CPU = torch.device("cpu")
LAYERS = 5


def output(model, seed=0):
    with torch.no_grad():
        return model(input_ids=ids(seed), use_cache=False).logits


@pytest.mark.parametrize("layers", [1, 2, LAYERS])
@pytest.mark.parametrize("late", [False, True])
def test_outputs_are_the_same_to_the_bit(layers, late):
    model = llama(layers)
    expected = [output(model, seed) for seed in (0, 1, 2)]
    streams = LateStreams() if late else None
    stream(model, CPU, streams=streams)
    assert all(torch.equal(output(model, seed), expected[seed]) for seed in (0, 1, 2))
    assert not late or not streams.broken


def test_bf16_a_classifier_and_files_stream_too(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config).bfloat16().eval()
    with torch.no_grad():
        expected = model(input_ids=ids()).logits
        placed = place_frozen(model, CPU, streamed=True, offload_dir=tmp_path)
        assert placed is model
        assert torch.equal(model(input_ids=ids()).logits, expected)
    assert not list(tmp_path.iterdir())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_not_streamed_is_frozen_and_moved():
    model = place_frozen(llama(1), CPU, streamed=False)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "streamed")


def test_two_layers_are_on_the_device_and_each_moves_once_a_forward():
    model = llama(LAYERS)
    layer = model.get_base_model().model.layers[0]
    nbytes = sum(p.numel() * p.element_size() for p in layer.parameters())
    streamed = stream(model, CPU)
    assert streamed.host_bytes == pytest.approx(LAYERS * nbytes, rel=0.02)
    assert streamed.device_bytes == pytest.approx(2 * nbytes, rel=0.02)
    output(model)
    # After the last layer the first is fetched for the next batch, which then finds it there.
    assert streamed.bytes_moved == (LAYERS + 1) * streamed.host_bytes // LAYERS
    output(model)
    assert streamed.bytes_moved == (2 * LAYERS + 1) * streamed.host_bytes // LAYERS


def test_weights_are_in_host_memory_between_the_layers():
    model = llama(LAYERS)
    streamed = stream(model, CPU)
    slots = {slot.room.untyped_storage().data_ptr() for slot in streamed.slots}
    inside = []
    layers = model.get_base_model().model.layers

    def on_device(layer):
        return {p.untyped_storage().data_ptr() for p in layer.parameters()} <= slots

    for layer in layers:
        layer.mlp.register_forward_pre_hook(
            lambda *_: inside.append([on_device(other) for other in layers])
        )
    output(model)
    assert inside == [[i == j for j in range(LAYERS)] for i in range(LAYERS)]
    assert not any(on_device(layer) for layer in layers)


def test_the_next_layer_is_fetched_before_this_one_runs_and_after_the_previous_one():
    model = llama(LAYERS)
    streams = LateStreams()
    for i, layer in enumerate(model.get_base_model().model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: streams.log.append(("run", i)))
    stream(model, CPU, streams=streams)
    output(model)
    kinds = [kind for kind, _ in streams.log]
    # Layer 0 was not there: asked for and waited for. Every layer then finds its own copy asked
    # for, and asks for the next into the slot of the one before, behind an event taken now.
    assert kinds == ["record", "copy"] + ["wait", "record", "copy", "run"] * LAYERS
    copies = [numbers for kind, numbers in streams.log if kind == "copy"]
    assert all(after == number - 1 for number, after in copies)
    assert [event for kind, event in streams.log if kind == "wait"] == [n for n, _ in copies[:-1]]


def test_a_forward_that_fails_puts_the_weights_back():
    model = llama(LAYERS)
    expected = output(model)
    streamed = stream(model, CPU)
    layer = streamed.layers[2]
    hook = layer.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output(model)
    hook.remove()
    own = streamed.packed[2].host.untyped_storage().data_ptr()
    assert {p.untyped_storage().data_ptr() for p in layer.parameters()} == {own}
    assert torch.equal(output(model), expected)


def test_layers_in_another_order_are_fetched_when_they_are_wanted():
    model = llama(LAYERS)
    layers = model.get_base_model().model.layers
    streams = LateStreams()
    with torch.no_grad():
        x = torch.randn(1, 3, 32)
        position = model.get_base_model().model.rotary_emb(x, torch.arange(3)[None])

        def run(i):
            return layers[i](x, position_embeddings=position)

        expected = {i: run(i) for i in (3, 0, 4, 4, 1)}
        stream(model, CPU, streams=streams)
        for i in (3, 0, 4, 4, 1):
            torch.testing.assert_close(run(i), expected[i], atol=0, rtol=0)
    assert not streams.broken


def test_a_gradient_is_refused():
    model = llama(2)
    stream(model, CPU)
    embedded = model.get_input_embeddings()(ids()).requires_grad_(True)
    with pytest.raises(ValueError, match="no_grad"):
        model(inputs_embeds=embedded, use_cache=False)
    output(model)


def test_close_removes_the_hooks():
    model = llama(2)
    expected = output(model)
    streamed = stream(model, CPU)
    streamed.close()
    assert torch.equal(output(model), expected)
    assert streamed.bytes_moved == 0


def test_host_buffers_come_in_a_few_sizes():
    plain, pinned = HostMemory(CPU), HostMemory(torch.device("cuda"))
    assert pinned.rounded(1_100_000) == 1 << 21
    assert plain.rounded(1_100_000) == 9 << 17  # of the eight sizes from 2^20 to 2^21, the first
    for nbytes in (1, 64, 65, 4095, 4096, 4097):
        assert 0 <= plain.rounded(nbytes) - nbytes <= max(63, nbytes // 8)
    assert len({plain.rounded(n) for n in range(1 << 12, 1 << 13)}) == 9
