"""The operators' part of the table of bad input: every call raises the line that it promises."""

from __future__ import annotations

import pytest
import torch

import fastppo.ops
from tests.bad import Case, cases


@pytest.mark.parametrize("case", cases("ops"), ids=lambda case: case.wrong)
def test_bad_calls(case: Case):
    torch.manual_seed(0)
    names = {name: getattr(fastppo.ops, name) for name in fastppo.ops.__all__}
    inputs = {
        "torch": torch,
        "logits": torch.randn(4, 7),
        "hidden": torch.randn(4, 3),
        "weight": torch.randn(7, 3),
        "token": torch.tensor([1, 0, 6, 3]),
        "behaviour": -torch.rand(4),
        "advantage": torch.randn(4),
        "mean": torch.full((4,), 0.25),
        "offsets": torch.tensor([0, 2, 4]),
    }
    with pytest.raises((ValueError, TypeError)) as error:
        eval(case.call, {**names, **inputs})
    assert case.is_said(f"{type(error.value).__name__}: {error.value}"), error.value
