"""What no op accepts, from the registry: it names itself, the argument, what it wanted and got."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo.ops import PolicyLossConfig, policy_loss
from fastppo.ops.registry import OPS, Op, Shape

SHAPE = Shape(n=4, vocab=7, hidden=3, batch=2)


def tensors_of(op: Op) -> list[str]:
    return [k for k, x in inputs_of(op).items() if isinstance(x, Tensor)]


def inputs_of(op: Op) -> dict[str, Any]:
    return op.make_inputs(SHAPE, torch.float32, 0)


PLACES = [(op, name) for op in OPS.values() for name in tensors_of(op)]
EVERY = pytest.mark.parametrize(
    ("op", "name"), PLACES, ids=[f"{op.name}-{name}" for op, name in PLACES]
)


@EVERY
def test_another_dtype(op, name):
    """Integer advantages, float tokens."""
    inputs = inputs_of(op)
    wrong = torch.float32 if name in ("token_N", "offsets") else torch.int64
    with pytest.raises(TypeError, match=rf"^{op.name}: .*{name}.* came torch\.") as raised:
        op.function(**{**inputs, name: inputs[name].to(wrong)})
    assert "\n" not in str(raised.value)


@EVERY
def test_another_shape(op, name):
    inputs = inputs_of(op)
    with pytest.raises(ValueError, match=rf"^{op.name}: ") as raised:
        op.function(**{**inputs, name: inputs[name][None]})
    assert "came" in str(raised.value)


@EVERY
def test_another_device(op, name):
    if len(tensors_of(op)) == 1:
        return  # it has no other to differ from
    inputs = inputs_of(op)
    with pytest.raises(ValueError, match=rf"^{op.name}: .* must be on .*, came .*; move it"):
        op.function(**{**inputs, name: inputs[name].to("meta")})


@pytest.mark.parametrize("name", ["token_logprobs", "policy_loss", "score_tokens"])
def test_an_empty_vocabulary(name):
    inputs = inputs_of(OPS[name])
    empty = {k: x[:, :0] for k, x in inputs.items() if k.endswith("logits_NV")}
    with pytest.raises(ValueError, match=rf"^{name}: the vocabulary is empty"):
        OPS[name].function(**{**inputs, **empty})


def test_a_coefficient_that_is_no_scalar():
    inputs = inputs_of(OPS["policy_loss"])
    with pytest.raises(ValueError, match=r"^policy_loss: kl_coef must be a float or a 0-d tensor"):
        policy_loss(**{**inputs, "kl_coef": torch.ones(4)})


def test_a_dual_clip_inside_the_clip():
    with pytest.raises(ValueError, match=r"dual_clip must be > 1 \+ clip_high = 1.2, came 1.1"):
        PolicyLossConfig(dual_clip=1.1)
