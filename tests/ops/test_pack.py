"""Live tokens of a padded batch, side by side and back."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import pack

MASK = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]])


def test_indices_and_offsets_by_hand():
    packing = pack(MASK)
    assert packing.index_N.tolist() == [1, 2, 8, 11]
    assert packing.offsets.tolist() == [0, 2, 2, 4]
    assert packing.offsets.dtype == torch.int32
    assert len(packing) == 4


@pytest.mark.parametrize("rest", [(), (5,)])
def test_gather_and_scatter_are_inverse_on_what_is_live(rest):
    packing = pack(MASK.bool())
    x = torch.randn(3, 4, *rest)
    back = packing.scatter(packing.gather(x))
    live = MASK.bool()
    assert torch.equal(back[live], x[live])
    assert not back[~live].any()


def test_gradients_go_to_where_the_values_came_from():
    x = torch.randn(3, 4, requires_grad=True)
    pack(MASK).gather(x).sum().backward()
    assert torch.equal(x.grad, MASK.float())


def test_refusals():
    with pytest.raises(ValueError, match=r"pack: mask_BT must have shape \(B, T\), came \(3,\)"):
        pack(torch.ones(3))
    with pytest.raises(ValueError, match=r"Packing.gather: .*\(3, 4\), came \(4, 3\)"):
        pack(MASK).gather(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"Packing.scatter: .*\(4,\), came"):
        pack(MASK).scatter(torch.zeros(5))
