"""Layers that are put in for a rollout: what they replace, what they give, and that they leave."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastppo.models.lora import merge_active_adapters
from fastppo.ops.native_library import OBSTACLE
from fastppo.ppo.cpu_layers import rms_scale, use_cpu_layers
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


def forwards(model):
    return [vars(module).get("forward") for module in model.modules()]


@pytest.mark.parametrize("family", NORMS)
def test_norms_are_known_by_what_they_give(family):
    norms = [m for m in model_of(family).modules() if type(m).__name__.endswith("RMSNorm")]
    assert norms
    for norm in norms:
        wanted = norm.weight + (NORMS[family] != "weight")
        assert torch.equal(rms_scale(norm), wanted)


def test_a_norm_that_is_another_is_left_as_it_is():
    class PartRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return self.weight * x / x.abs().mean(-1, keepdim=True)

    assert rms_scale(PartRMSNorm()) is None
    assert rms_scale(torch.nn.LayerNorm(8)) is None


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "phi", "cohere2"])
def test_a_model_gives_what_it_gave_and_keeps_nothing(family):
    model, ids = model_of(family), torch.arange(40, 52)[None]
    before = forwards(model)
    with torch.no_grad():
        wanted = model(ids).logits
        with use_cpu_layers(model):
            assert forwards(model) != before
            found = model(ids).logits
    assert forwards(model) == before
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("role", ["actor", "reference"])
@pytest.mark.parametrize("merge", [False, True])
def test_adapters_act_as_before(tiny_roles, role, merge):
    """A merged layer and one whose adapters are off are their base; another is not."""
    made, ids = tiny_roles(), torch.arange(40, 52)[None]
    before = forwards(made.model)
    with made.use(role), torch.no_grad():
        wanted = made.base(ids).logits
        if merge:
            with merge_active_adapters(made.base), use_cpu_layers(made.base):
                found = made.base(ids).logits
        else:
            with use_cpu_layers(made.base):
                found = made.base(ids).logits
    assert forwards(made.model) == before
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
