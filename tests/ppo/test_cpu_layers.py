"""Layers that are put in for a rollout: what they replace, what they give, and that they leave."""

from __future__ import annotations

import pytest
import torch

from fastppo.models.lora import merge_active_adapters
from fastppo.models.native_layers import fuse_native_layers
from fastppo.ops.native_library import OBSTACLE
from fastppo.ppo.cpu_layers import use_cpu_layers
from tests.models.test_native_layers import model_of

pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"no native kernels: {OBSTACLE}")


def forwards(model):
    return [vars(module).get("forward") for module in model.modules()]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "phi", "cohere2"])
def test_a_model_gives_what_it_gave_and_keeps_nothing(family):
    model, ids = model_of(family), torch.arange(40, 52)[None]
    fuse_native_layers(model)
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
