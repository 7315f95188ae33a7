"""OpenRLHF 0.11.2's losses, KL and GAE give what ours give, on random batches with holes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastppo import ops
from fastppo.ops import losses
from fastppo.ppo.advantage import overlong_penalty
from tests.peers import theirs
from tests.peers.theirs import assert_same_loss

pytestmark = pytest.mark.peers

LOW, HIGH = 0.2, 0.28
AGGREGATION = {True: "token-mean", False: "seq-mean-token-mean"}


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_policy_loss(by_token, dual_clip):
    loss = theirs.openrlhf("loss").PolicyLoss(LOW, HIGH, dual_clip, by_token)
    for b in theirs.batches():
        assert_same_loss(
            lambda x, b=b: losses.aggregate(
                losses.ppo_clip(
                    x,
                    b.old_logprob,
                    b.advantage,
                    b.mask,
                    clip_low=LOW,
                    clip_high=HIGH,
                    dual_clip=dual_clip,
                ).loss,
                b.mask,
                AGGREGATION[by_token],
            ),
            lambda x, b=b: loss(x, b.old_logprob, b.advantage, b.mask)[0],
            b.logprob,
            1e-7,  # 1e-8 is added to a sequence's length
        )


def test_gspo():
    """Advantages of tokens, too: the gradient goes through the mean to all tokens of a sequence."""
    loss = theirs.openrlhf("loss").PolicyLoss(LOW, HIGH, policy_loss_type="gspo")
    for b in theirs.batches():
        assert_same_loss(
            lambda x, b=b: losses.aggregate(
                losses.gspo(
                    x, b.old_logprob, b.advantage, b.mask, clip_low=LOW, clip_high=HIGH
                ).loss,
                b.mask,
                "seq-mean-token-mean",
            ),
            lambda x, b=b: loss(x, b.old_logprob, b.advantage, b.mask)[0],
            b.logprob,
            1e-7,
        )


@pytest.mark.parametrize("mode", ["clip", "mask"])
def test_correction_of_the_samplers_log_probs(mode):
    """Their coefficient of a token is our importance weight."""
    low, high = 0.8, 1.3
    loss = theirs.openrlhf("loss").PolicyLoss(
        LOW,
        HIGH,
        is_correction_level="token",
        is_correction_mode=mode,
        is_correction_threshold=(low, high),
    )
    ours = {"clip": "token_truncate", "mask": "token_mask"}[mode]
    for b in theirs.batches():
        weight = losses.importance_weights(
            b.old_logprob, b.ref_logprob, b.mask, mode=ours, lower=low, upper=high
        )
        assert_same_loss(
            lambda x, b=b, weight=weight: losses.aggregate(
                weight
                * losses.ppo_clip(
                    x, b.old_logprob, b.advantage, b.mask, clip_low=LOW, clip_high=HIGH
                ).loss,
                b.mask,
            ),
            lambda x, b=b: loss(x, b.old_logprob, b.advantage, b.mask, b.ref_logprob)[0],
            b.logprob,
        )


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_value_loss(by_token, clip):
    loss = theirs.openrlhf("loss").ValueLoss(clip, by_token)
    for b in theirs.batches():
        assert_same_loss(
            lambda x, b=b: losses.aggregate(
                losses.value_loss(x, b.old_value, b.reward, b.mask, clip=clip).loss,
                b.mask,
                AGGREGATION[by_token],
            ),
            lambda x, b=b: loss(x, b.old_value, b.reward, b.mask),
            b.value,
            1e-7,
        )


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("apart", [1.0, 40.0], ids=("near", "beyond the limit"))
def test_approximate_kl(kind, straight_through, apart):
    """Theirs is in float32, whatever comes in."""
    for b in theirs.batches():
        b = b._replace(ref_logprob=b.logprob + apart * (b.ref_logprob - b.logprob))
        assert_same_loss(
            lambda x, b=b: losses.kl(
                x, b.ref_logprob, b.mask, kind=kind, straight_through=straight_through, limit=10.0
            ).sum(),
            lambda x, b=b: (
                b.mask
                * theirs.openrlhf("utils").compute_approx_kl(
                    x, b.ref_logprob, kl_estimator=kind, unbiased_gradient=straight_through
                )
            ).sum(),
            b.logprob,
            1e-5,
        )


def offsets_of(mask):
    lengths = mask.sum(1).int()
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8)])
def test_gae_without_holes(gamma, lam):
    for b in theirs.batches(holes=False):
        live = b.mask != 0
        want = theirs.openrlhf_gae()(b.value, b.reward, b.mask, gamma, lam)
        ours = ops.gae(b.reward[live], b.value[live], offsets_of(b.mask), gamma=gamma, lam=lam)
        for mine, other in zip(ours, want, strict=True):
            torch.testing.assert_close(mine, other[live])


def test_their_gae_steps_through_holes():
    """A hole is a step of value 0 and reward 0 there: each takes one more gamma * lam.

    By hand, gamma = 1, lam = 1/2, V = 0 and one reward of 8 behind a hole: ours gives the first
    token 8 / 2; theirs 8 / 4.
    """
    value, reward = torch.zeros(1, 3), torch.tensor([[0.0, 5.0, 8.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    want, _ = theirs.openrlhf_gae()(value, reward, mask, 1.0, 0.5)
    ours, _ = ops.gae(torch.tensor([0.0, 8.0]), torch.zeros(2), offsets_of(mask), lam=0.5)
    assert ours.tolist() == [4.0, 8.0]
    assert want[0, [0, 2]].tolist() == [2.0, 8.0]


def test_overlong_penalty():
    """Lengths before and in the buffer, past max_new_tokens too; buffer and factor at random."""
    apply = theirs.openrlhf_length_penalty()
    generator = torch.Generator().manual_seed(0)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(theirs.ROUNDS):
        most = whole(1, 40)
        buffer_len, factor = whole(1, most), whole(0, 30) / 10
        length_B = torch.randint(1, most + 3, (7,), generator=generator)
        reward_B = torch.randn(7, generator=generator, dtype=torch.float64)
        experience = SimpleNamespace(response_length=length_B, rewards=reward_B.clone())
        count = apply([experience], most, buffer_len, factor)
        ours = overlong_penalty(length_B, max_new_tokens=most, buffer_len=buffer_len, factor=factor)
        torch.testing.assert_close(reward_B - ours, experience.rewards, rtol=0, atol=1e-12)
        assert count == (length_B > most - buffer_len).sum()
