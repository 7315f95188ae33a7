"""Offloading where it counts: the same gradients from a real side stream, and less memory held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from fastppo.offload.activations import ActivationOffload
from fastppo.offload.frozen import stream

LAYERS, HIDDEN, TOKENS = 8, 1024, 2048
CUDA = torch.device("cuda")


def llama(kind: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        # Not sdpa: the order in which its backward adds up is not fixed.
        attn_implementation="eager",
    )
    return kind(config).bfloat16().eval()


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(128, (1, TOKENS), generator=torch.Generator().manual_seed(seed)).to(CUDA)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_gradients_are_the_same_and_memory_falls():
    model = llama(LlamaForCausalLM).to(CUDA)
    found, held = {}, {}
    for mode in ("none", "checkpoint", "offload", "checkpoint+offload"):
        context = ActivationOffload(model, mode)
        for seed in (0, 1):  # the second step reuses the ring
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            with context:
                hidden = model.model(input_ids=ids(seed), use_cache=False).last_hidden_state
            held[mode] = torch.cuda.memory_allocated() - before
            hidden.float().square().mean().backward()
        found[mode] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        del hidden
    for mode, gradients in found.items():
        assert all(torch.equal(gradients[name], found["none"][name]) for name in gradients), mode
    one_input = TOKENS * HIDDEN * 2
    # One input is kept and two are still leaving.
    saved = held["checkpoint"] - held["checkpoint+offload"]
    assert saved == pytest.approx((LAYERS - 3) * one_input, rel=0.05)
    assert held["offload"] < held["none"] / 2


def test_a_streamed_model_says_the_same_in_two_layers_of_memory():
    model = llama(LlamaModel)
    resident = llama(LlamaModel).to(CUDA)
    streamed = stream(model, CUDA)
    with torch.no_grad():
        for seed in (0, 1):
            both = [m(input_ids=ids(seed), use_cache=False)[0] for m in (resident, model)]
            assert torch.equal(*both)
    assert streamed.device_bytes < 0.3 * streamed.host_bytes
