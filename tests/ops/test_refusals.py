"""What no op accepts, from the registry: it names itself, the argument, what it wanted and got.

What a single op refuses is in the table of bad input, tests/bad/ops.yaml.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.registry import OPS, Op, Shape

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
