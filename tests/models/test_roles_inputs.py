"""Adapters of a bfloat16 base take their input as it is: the same to the bit, and less is kept."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import peak_bytes
from fastppo.models.adapters import disable_input_cast
from tests.memory.allocations import NEEDS_GROUPED_KEYS, allocations_of
from tests.offload.tools import gradients, ids, llama, same

ROWS, LENGTH = 4, 128


def run(dtype: torch.dtype, *, left: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Hidden states, the adapters' gradients, and the peak of forward and backward."""
    model = llama()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    if left:
        disable_input_cast(model)
    trunk, input_ids = model.get_base_model().model, ids(batch=ROWS, tokens=LENGTH)
    found = []

    def both() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()
        found.append(hidden.detach())

    both()
    first = gradients(model)
    peak = peak_bytes(allocations_of(both))
    return found[0], first, peak


@NEEDS_GROUPED_KEYS
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_hidden_states_and_gradients_are_the_same_to_the_bit_and_less_is_held(dtype):
    hidden, gradient, peak = run(dtype, left=False)
    hidden_left, gradient_left, peak_left = run(dtype, left=True)
    assert torch.equal(hidden, hidden_left)
    assert same(gradient, gradient_left)
    if dtype == torch.float32:
        assert peak_left == peak
    else:
        # A copy for each of the 7 adapted layers was kept: 6 of 32 and one of 64 a token. Now q, k
        # and v share one, so do gate and up, o's is the attention's own output, and down has one.
        less = 5 * ROWS * LENGTH * ((6 * 32 + 64) - (32 + 32 + 64)) * 2
        assert peak - peak_left == pytest.approx(less, rel=0.02)


def test_dora_keeps_its_cast(tiny_roles):
    def casts(**changes: object) -> set[bool]:
        modules = tiny_roles(**changes).model.modules()
        layers = [module for module in modules if hasattr(module, "lora_A")]
        return {getattr(layer, "cast_input_dtype_enabled", True) for layer in layers}

    assert casts() == {False}
    assert casts(use_dora=True) == {True}
