"""Norms and gated MLPs by native kernels: which modules get them, and that a model stays itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from fastppo.models import native_layers
from fastppo.models.native_layers import (
    NativeMLP,
    NativeNorm,
    fuse_native_layers,
    native_mlp,
    native_norm,
)
from fastppo.ops import backend
from fastppo.ops.native_library import OBSTACLE
from tests import zoo

pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"no native kernels: {OBSTACLE}")
NORMS = {"llama": "weight", "qwen3": "weight", "olmo2": "weight", "gemma2": "1 + weight"}


def model_of(family):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(zoo.config_of(family)).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def native(model):
    """The classes of the forwards that modules have of their own."""
    return [type(vars(module).get("forward")) for module in model.modules()]


@pytest.mark.parametrize("family", NORMS)
def test_norms_are_known_by_what_they_give(family):
    norms = [m for m in model_of(family).modules() if type(m).__name__.endswith("RMSNorm")]
    assert norms
    for norm in norms:
        wanted = norm.weight + (NORMS[family] != "weight")
        assert torch.equal(native_norm(norm).norm.weight_D, wanted)


def test_a_norm_that_is_another_is_left_as_it_is():
    class PartRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return self.weight * x / x.abs().mean(-1, keepdim=True)

    class GatedRMSNorm(PartRMSNorm):
        def forward(self, x, gate):
            return super().forward(x) * gate

    for module in (PartRMSNorm(), GatedRMSNorm(), nn.LayerNorm(8)):
        assert native_norm(module) is None


def test_an_mlp_that_is_another_is_left_as_it_is():
    class Scaled(LlamaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    class OfTwo(LlamaMLP):
        def forward(self, x, residual):
            return super().forward(x) + residual

    class Weighted(LlamaMLP):
        def __init__(self, config):
            super().__init__(config)
            self.weight = nn.Parameter(torch.ones(3))

    config = zoo.config_of("llama")
    assert native_mlp(LlamaMLP(config)) is not None
    for kind in (Scaled, OfTwo, Weighted):
        assert native_mlp(kind(config)) is None
    gelu = LlamaMLP(config)
    gelu.act_fn = nn.GELU()
    assert native_mlp(gelu) is None
    assert native_mlp(LlamaMLP(config).to("meta")) is None


def test_a_look_draws_no_random_number_and_leaves_the_module(tmp_path):
    module = LlamaMLP(zoo.config_of("llama"))
    before, state = dict(module.named_parameters()), torch.get_rng_state()
    native_mlp(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter is before[name] for name, parameter in module.named_parameters())


# Which of its modules: norms, and MLPs unless their activation is another or gate and up are one.
GETS = {
    "llama": (NativeNorm, NativeMLP),
    "mistral": (NativeNorm, NativeMLP),
    "qwen2": (NativeNorm, NativeMLP),
    "qwen3": (NativeNorm, NativeMLP),
    "olmo2": (NativeNorm, NativeMLP),
    "gemma2": (NativeNorm,),
    "gemma3_text": (NativeNorm,),
    "phi3": (NativeNorm,),
    "cohere2": (NativeMLP,),
    "stablelm": (NativeMLP,),
    "phi": (),
}


@pytest.mark.parametrize("family", GETS)
def test_a_model_gives_what_it_gave_with_the_same_gradients(family):
    results = []
    for fused in (False, True):
        model = model_of(family).requires_grad_(False)
        if fused:
            fuse_native_layers(model)
            assert set(native(model)) - {type(None)} == set(GETS[family])
        x = model.get_input_embeddings()(torch.arange(40, 52)[None]).detach().requires_grad_()
        hidden = model.base_model(inputs_embeds=x, use_cache=False).last_hidden_state
        (grad,) = torch.autograd.grad(hidden.square().sum(), x)
        results.append((hidden.detach(), grad))
    for own, found in zip(*results, strict=True):
        torch.testing.assert_close(found, own, atol=1e-5 * own.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("family", NORMS)
def test_a_norm_whose_weight_trains_gets_its_gradient(family):
    gradients = []
    for fused in (False, True):
        model = model_of(family)
        if fused:
            fuse_native_layers(model)
        model(torch.arange(40, 52)[None]).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.dim() == 1})
    assert len(gradients[0]) > 4
    for name, own in gradients[0].items():
        close = {"atol": 2e-5 * own.abs().max().item(), "rtol": 1e-4}
        torch.testing.assert_close(gradients[1][name], own, **close)


def test_a_weight_that_has_been_trained_is_the_one_that_counts():
    model, ids = model_of("gemma2"), torch.arange(40, 52)[None]
    fuse_native_layers(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
        found = model(ids).logits
        for module in model.modules():
            vars(module).pop("forward", None)
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_another_dtype_runs_the_models_own():
    model, ids = model_of("llama"), torch.arange(40, 52)[None]
    with torch.no_grad():
        wanted = model.to(torch.bfloat16)(ids).logits
        model.float()
        fuse_native_layers(model)
        found = model.to(torch.bfloat16)(ids).logits
    assert torch.equal(found, wanted)


def test_without_the_kernels_nothing_changes(monkeypatch):
    monkeypatch.setattr(backend, "FORCED", "torch")
    model = model_of("llama")
    fuse_native_layers(model)
    assert set(native(model)) == {type(None)}


@pytest.mark.parametrize("finetuning", ["lora", "freeze", "full"])
def test_all_passes_of_a_role_run_them(tiny_roles, monkeypatch, finetuning):
    """Frozen or trained: else the KL would not be 0 before the first update."""
    calls = []
    for name in ("rms_norm", "gated_unit"):
        own = getattr(native_layers, name)
        counted = lambda *x, own=own, name=name: calls.append(name) or own(*x)  # noqa: E731
        monkeypatch.setattr(native_layers, name, counted)
    critic = {} if finetuning == "lora" else {"critic": "shared"}
    made = tiny_roles(finetuning_type=finetuning, freeze_trainable_layers=1, **critic)
    layers = made.trunk.config.num_hidden_layers
    calls.clear()
    ids_BT = torch.arange(40, 52)[None]
    with made.use("actor"):
        made.train()
        made.hidden(ids_BT)
        made.eval()
    assert calls.count("gated_unit") == layers
    assert calls.count("rms_norm") == 2 * layers + 1
