"""What is of the wrong kind, in every argument of every operator, is refused in words."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from fastppo.ops import HeadLora, linear_token_logprobs
from tests.ops.registry import OPS, Op, Shape, make_hidden
from tests.tiers import slow_unless

SHAPE = Shape(n=6, vocab=19, hidden=5)
KINDS: dict[str, Any] = {
    "None": None,
    "a list": [1.0, 2.0],
    "a string": "1",
    "a float": 0.5,
    "integers": torch.tensor([[3]]),
}
# What is right all the same.
FLOATS = ("temperature", "softcap", "logit_scale", "clip", "kl_coef", "entropy_coef", "grad_scale")
FLOATS = (*FLOATS, "log_ratio_limit", "gamma", "lam")


def accepts(op: Op, name: str, kind: str) -> bool:
    parameter = inspect.signature(op.function).parameters[name]
    if kind == "None":
        return "None" in str(parameter.annotation)
    if (name, kind) == ("offsets", "integers"):
        return "None" in str(parameter.annotation)  # not read where no ratio is by sequence
    return kind == "a float" and name in FLOATS


ARGUMENTS = [
    (op, name, kind)
    for op in OPS.values()
    for name in inspect.signature(op.function).parameters
    for kind in KINDS
    if not accepts(op, name, kind)
]


def first_of_its_argument(op: Op, name: str, kind: str) -> bool:
    """The first kind that the argument does not take: the fast tier has one for each argument."""
    return kind == next(other for other in KINDS if not accepts(op, name, other))


@pytest.mark.parametrize(
    ("op", "name", "kind"),
    slow_unless(first_of_its_argument, ARGUMENTS),
    ids=lambda value: getattr(value, "name", value),
)
def test_a_wrong_kind_is_refused_in_words(op, name, kind):
    inputs = op.make_inputs(SHAPE, torch.float32, 0) | {name: KINDS[kind]}
    with pytest.raises((TypeError, ValueError)) as error:
        op.function(**inputs)
    message = str(error.value)
    said = {"kind": "KL kind", "kl_kind": "KL kind", "backend": "backend"}.get(name, name)
    assert message.startswith(f"{op.name}: ")
    assert said in message
    assert "came" in message or "is no backend" in message
    assert "\n" not in message


@pytest.mark.parametrize("part", ["A_RD", "B_VR"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_kind_in_an_adapter_is_refused_in_words(part, kind):
    parts = {"A_RD": torch.ones(2, 5), "B_VR": torch.ones(19, 2), part: KINDS[kind]}
    with pytest.raises(TypeError, match=rf"^linear_token_logprobs: head_lora.{part} must"):
        linear_token_logprobs(**make_hidden(SHAPE, torch.float32, 0), head_lora=HeadLora(**parts))
