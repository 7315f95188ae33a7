"""torchrl 0.14.1's GAE, loop and vectorised, gives what ours gives."""

from __future__ import annotations

import pytest
import torch

from fastppo import ops
from tests.peers import theirs

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(
    "name", ["generalized_advantage_estimate", "vec_generalized_advantage_estimate"]
)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8)])
def test_gae(name, gamma, lam):
    """Sequences of any length: theirs end where `done` says so, and padding comes after that."""
    estimate = getattr(theirs.torchrl(), name)
    for b in theirs.batches(holes=False):
        lengths = b.mask.sum(1).int()
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        live = b.mask != 0
        done = torch.zeros_like(live).scatter(1, lengths[:, None].long() - 1, True)
        done[:, -1] = True
        following = torch.cat([b.value[:, 1:], torch.zeros(len(lengths), 1)], dim=1)
        columns = (x[..., None].clone() for x in (b.value, following, b.reward, done, done))
        want = [x[..., 0] for x in estimate(gamma, lam, *columns)]
        ours = ops.gae(b.reward[live], b.value[live], offsets, gamma=gamma, lam=lam)
        for mine, other in zip(ours, want, strict=True):
            torch.testing.assert_close(mine, other[live].double(), rtol=1e-6, atol=1e-6)
