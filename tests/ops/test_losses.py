"""The per-token losses, worked by hand; and the fused copies in the kernels, held to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastppo.ops import PolicyLossConfig, policy_loss
from fastppo.ops.losses import ppo_clip
from tests.ops.oracle import device_of

# Ratio, advantage, loss and slope in the ratio of PPO with 0.2, 0.28 and a dual clip of 3.
BY_HAND = [
    (1.0, 2.0, -2.0, -2.0),  # on the behaviour policy: -A rho
    (1.27, 2.0, -2.54, -2.0),  # still within 1.28
    (1.5, 2.0, -2.56, 0.0),  # no more than -A 1.28 to gain
    (0.5, 2.0, -1.0, -2.0),  # worse than the clipped one: not clipped
    (0.5, -2.0, 1.6, 0.0),  # no less than -A 0.8 to gain
    (1.5, -2.0, 3.0, 2.0),
    (3.5, -2.0, 6.0, 0.0),  # the dual clip's 3 |A|
    (1.5, 0.0, 0.0, 0.0),
]
CLIP = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), BY_HAND)
def test_the_clipped_surrogate_by_hand(ratio, advantage, loss, slope):
    leaf = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(1, dtype=torch.float64)
    found = ppo_clip(leaf, old, torch.tensor([advantage], dtype=torch.float64), **CLIP)
    found.loss.sum().backward()
    assert found.loss.item() == pytest.approx(loss)
    assert leaf.grad.item() == pytest.approx(slope * ratio)  # dratio/dlogprob is the ratio
    assert found.clipped_high.item() == (ratio > 1.28 and advantage > 0)
    assert found.clipped_low.item() == (ratio < 0.8 and advantage < 0)
    assert found.dual_clipped.item() == (ratio > 3 and advantage < 0)


def fused(ratio_N: Tensor, advantage_N: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Loss of each token and its slope in the ratio, from logits of two words and a fused kernel.

    Both words have log-prob log 1/2; the behaviour policy had what makes the ratio.
    """
    device, n = device_of(backend), ratio_N.numel()
    token_N = torch.zeros(n, dtype=torch.long, device=device)
    behaviour_N = (math.log(0.5) - ratio_N.log()).to(device)
    losses = []
    for i in range(n):
        one = (x[i : i + 1] for x in (token_N, behaviour_N, advantage_N.to(device)))
        given = (torch.zeros(1, 2, device=device), *one, torch.ones(1, device=device))
        losses.append(policy_loss(*given, config=PolicyLossConfig(**CLIP), backend=backend).loss)
    leaf = torch.zeros(n, 2, device=device, requires_grad=True)
    ones_N = torch.ones(n, device=device)
    given = (leaf, token_N, behaviour_N, advantage_N.to(device), ones_N)
    policy_loss(*given, config=PolicyLossConfig(**CLIP), backend=backend).loss.backward()
    # dlogprob/dlogit of the sampled word is 1/2, dratio/dlogprob is the ratio.
    return torch.stack(losses).cpu(), 2 * leaf.grad[:, 0].cpu() / ratio_N


def test_the_fused_surrogates_are_this_one(backend):
    ratio_N = torch.tensor(
        [ratio for ratio, *_ in BY_HAND] + [0.0625, 0.75, 0.8125, 1.25, 2.9, 16.0]
    )
    signs = torch.tensor([a for _, a, *_ in BY_HAND] + [1.0, -1.0, -3.0, 0.5, -0.25, -2.0])
    for advantage_N in (signs, -signs):
        leaf = ratio_N.log().requires_grad_()
        want = ppo_clip(leaf, torch.zeros_like(leaf), advantage_N, **CLIP).loss
        want.sum().backward()
        loss_N, slope_N = fused(ratio_N, advantage_N, backend)
        torch.testing.assert_close(loss_N, want.detach(), atol=1e-6, rtol=2e-6)
        torch.testing.assert_close(slope_N, leaf.grad / ratio_N, atol=1e-6, rtol=2e-6)
