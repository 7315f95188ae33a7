"""The fused LoRA layer says what PEFT's says, and learns what it learns."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastppo.models import lora
from fastppo.models.lora import fusable_adapter, fuse_lora_layers, lora_linear


@pytest.fixture
def layer():
    """A LoRA layer in float64 whose adapters are not 0."""

    def make(bias=True, dtype=torch.float64, **settings):
        torch.manual_seed(0)
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], **settings)
        model = get_peft_model(nn.Sequential(nn.Linear(6, 5, bias=bias)), config).to(dtype)
        made = model.base_model.model[0]
        for weight in made.lora_B.values():
            nn.init.normal_(weight.weight)
        return model, made

    return make


def run(made, x):
    """Output, and the gradients of input, A and B."""
    x = x.clone().requires_grad_()
    out = made(x)
    a, b = made.lora_A["default"].weight, made.lora_B["default"].weight
    grads = torch.autograd.grad((out * torch.arange(1.0, 6.0)).square().sum(), (x, a, b))
    return [out.detach(), *grads]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_output_and_gradients_are_pefts(layer, bias, use_rslora):
    model, made = layer(bias, use_rslora=use_rslora)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    wanted = run(made, x)
    fuse_lora_layers(model)
    assert fusable_adapter(made, x) == "default"
    for found, want in zip(run(made, x), wanted, strict=True):
        torch.testing.assert_close(found, want, atol=1e-12, rtol=1e-12)


def test_gradcheck():
    torch.manual_seed(0)
    shapes = [(4, 6), (5, 6), (5,), (3, 6), (5, 3)]
    x, weight, bias, a, b = (torch.randn(s, dtype=torch.float64) for s in shapes)
    for trained in ((x, a, b), (a, b), (b,)):
        for tensor in (x, a, b):
            tensor.requires_grad_(any(tensor is t for t in trained))
        assert torch.autograd.gradcheck(
            lambda x, a, b: lora_linear(x, weight, bias, a, b, 1.7), (x, a, b)
        )


def test_with_gradient_and_without_are_the_same_bits(layer):
    """The ratio of an unmoved policy is exactly 1: scoring has no gradient, the update has."""
    model, made = layer(dtype=torch.float32)
    fuse_lora_layers(model)
    x = torch.randn(3, 7, 6)
    with torch.no_grad():
        without = made(x)
    assert torch.equal(made(x).detach(), without)


def test_under_autocast_it_is_no_further_from_the_truth_than_pefts(layer):
    """A bf16 base and float32 adapters, as a run in 16 bits has them."""
    model, made = layer()
    x = torch.randn(2, 40, 6, dtype=torch.float64).bfloat16().double()
    made.get_base_layer().bfloat16().double()
    exact = run(made, x)
    made.get_base_layer().bfloat16()
    for adapter in (made.lora_A, made.lora_B):
        adapter.float()
    made.cast_input_dtype_enabled = False  # as `tuning.disable_input_cast`
    found = {}
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("peft", "fused"):
            found[name] = run(made, x.bfloat16())
            with torch.no_grad():
                assert torch.equal(made(x.bfloat16()), found[name][0])
            fuse_lora_layers(model)
        assert fusable_adapter(made, x.bfloat16()) == "default"
        assert fusable_adapter(made, x.bfloat16()[:, :1]) is None  # a step of decoding
        assert fusable_adapter(made, x.float()) is None
    assert fusable_adapter(made, x.bfloat16()) is None
    assert [t.dtype for t in found["fused"]] == [t.dtype for t in found["peft"]]
    for ours, theirs, truth in zip(found["fused"], found["peft"], exact, strict=True):
        far = (theirs.double() - truth).norm()
        assert far < 0.02 * truth.norm()
        assert (ours.double() - truth).norm() <= 1.1 * far


def test_a_new_adapter_changes_no_bit(layer):
    model, made = layer(dtype=torch.float32)
    fuse_lora_layers(model)
    nn.init.zeros_(made.lora_B["default"].weight)
    x = torch.randn(3, 7, 6)
    assert torch.equal(made(x), made.get_base_layer()(x))


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}]
)
def test_layers_that_are_not_plain_lora_run_by_peft(layer, settings):
    model, made = layer(**settings)
    fuse_lora_layers(model)
    x = torch.randn(2, 6, dtype=torch.float64)
    assert fusable_adapter(made, x) is None
    made.eval()
    torch.testing.assert_close(made(x), type(made).forward(made, x))


def test_layers_in_other_states_run_by_peft(layer):
    model, made = layer()
    fuse_lora_layers(model)
    x = torch.randn(2, 6, dtype=torch.float64)
    said = made(x)
    model.base_model.disable_adapter_layers()
    assert fusable_adapter(made, x) is None
    torch.testing.assert_close(made(x), made.get_base_layer()(x))
    model.base_model.enable_adapter_layers()
    made.merge()
    assert fusable_adapter(made, x) is None
    torch.testing.assert_close(made(x), said)
    made.unmerge()
    assert fusable_adapter(made, x.float()) is None  # another dtype than the weights
    made.get_base_layer().weight.requires_grad_(True)
    assert fusable_adapter(made, x) is None  # its weight would want a gradient


def test_the_trainers_lora_layers_are_fused(tiny_roles):
    made = tiny_roles()
    x = torch.zeros(1, 1)
    layers = [m for m in made.model.modules() if hasattr(m, "lora_A")]
    assert layers
    assert all(fusable_adapter(layer, x) == "default" for layer in layers)
    assert all(layer.forward.__func__.__module__ == "fastppo.models.lora" for layer in layers)


def test_recomputing_a_block_skips_its_last_product(layer, monkeypatch):
    """Nothing behind it is saved: the base's GEMM runs once under checkpointing, PEFT's twice."""
    calls = []

    def grads(model, made):
        torch.manual_seed(1)
        model.zero_grad()
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
        out = checkpoint(lambda x: made(x.exp()) + x[:, :5], x, use_reentrant=False)
        out.square().sum().backward()
        return [x.grad, made.lora_A["default"].weight.grad, made.lora_B["default"].weight.grad]

    model, made = layer()
    made.get_base_layer().register_forward_hook(lambda *_: calls.append("peft"))
    wanted = [grad.clone() for grad in grads(model, made)]
    original = lora.lora_output
    monkeypatch.setattr(lora, "lora_output", lambda *a: calls.append("fused") or original(*a))
    fuse_lora_layers(model)
    found = grads(model, made)
    assert calls == ["peft", "peft", "fused"]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
