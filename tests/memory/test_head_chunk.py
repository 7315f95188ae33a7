"""The plan's logits of a trained head against what the loss allocates of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.harness import allocations, peak_bytes
from fastppo.memory.plan import make_plan
from fastppo.memory.shapes import TABLE
from fastppo.memory.weights import Shapes
from fastppo.ops import linear_policy_loss
from fastppo.ops.backend import available
from tests.memory.plans import plan_inputs
from tests.ops.registry import OPS, Shape

OP = OPS["linear_policy_loss"]
MODEL = replace(TABLE["Qwen/Qwen2.5-7B"], vocab=20000, hidden=288, dtype="float32")


@pytest.mark.skipif("native" not in available("cpu"), reason="needs the C++ kernels")
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("tokens", [256, 300], ids=["by words", "by rows"])
def test_the_chunk_of_a_trained_head_is_what_its_loss_allocates(tokens, entropy_coef):
    """Beside the gradients of hidden states and weight; 256 tokens fit into the weight's."""
    planned = plan_inputs(
        rewards=("function",),
        finetuning_type="full",
        entropy_coef=entropy_coef,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_new_tokens=tokens,
        device="cpu",
        compiled_ops=True,
    )
    plan = make_plan(planned, Shapes(MODEL))
    (loss,) = [peak for peak in plan.peaks if peak.name == "the actor's loss"]
    shape = Shape(n=tokens, vocab=MODEL.vocab, hidden=MODEL.hidden)
    inputs: dict[str, Any] = OP.make_inputs(shape, torch.float32, 0)
    inputs["entropy_coef"] = entropy_coef
    gradients = 0
    for name in ("hidden_ND", "weight_VD"):
        inputs[name].requires_grad_()
        gradients += inputs[name].numel() * 4
    call = lambda: linear_policy_loss(**inputs, backend="native").loss  # noqa: E731
    call()
    measured = peak_bytes(allocations(call)) - gradients
    assert loss.rows["head chunk"] == pytest.approx(measured, rel=0.1)
