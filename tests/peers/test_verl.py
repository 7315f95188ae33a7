"""verl 0.9.1's core_algos and rollout correction, held against ours on batches with holes."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from examples.gsm8k.reward import exact
from fastppo import ops
from fastppo.ops import losses
from fastppo.ppo.filter_groups import groups_that_differ
from tests.peers import theirs
from tests.peers.theirs import ActorConfig, Batch, assert_same_loss

pytestmark = pytest.mark.peers

LOW, HIGH, DUAL = 0.2, 0.28, 3.0
CLIP = {"clip_low": LOW, "clip_high": HIGH}
# Their name -> our function. Their "gspo" sends a token's gradient to that token: our gspo_token.
POLICY_LOSSES = {
    "vanilla": partial(losses.ppo_clip, **CLIP, dual_clip=DUAL),
    "gspo": partial(losses.gspo_token, **CLIP),
    "cispo": partial(losses.cispo, **CLIP),
    "sapo": partial(losses.sapo, tau_pos=1.0, tau_neg=1.05),
    "dppo_tv": partial(losses.dppo, divergence="tv", **CLIP, ratio_limit=DUAL),
    "dppo_kl": partial(losses.dppo, divergence="kl", **CLIP, ratio_limit=DUAL),
    "gpg": losses.reinforce,
}
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean")


def config() -> ActorConfig:
    return ActorConfig(
        clip_ratio=0.2,
        clip_ratio_low=LOW,
        clip_ratio_high=HIGH,
        clip_ratio_c=DUAL,
        tau_pos=1.0,
        tau_neg=1.05,
        global_batch_info={},
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_losses(name, mode):
    if name == "sapo" and mode != "seq-mean-token-mean":
        mode = "seq-mean-token-mean"  # theirs, whatever it is told
    loss = theirs.verl().get_policy_loss_fn(name)
    for b in theirs.batches(empty_rows=True):
        assert_same_loss(
            lambda x, b=b: losses.aggregate(
                POLICY_LOSSES[name](x, b.old_logprob, b.advantage, b.mask).loss, b.mask, mode
            ),
            lambda x, b=b: loss(b.old_logprob, x, b.advantage, b.mask, mode, config())[0],
            b.logprob,
            1e-7,  # their sequences' means add 1e-8 to a length, their binary KL to a probability
        )


def test_geo_mean():
    """Of one advantage a sequence; they take the mean over the batch's rows, empty ones too."""
    for b in theirs.batches(empty_rows=True):
        loss = theirs.verl().get_policy_loss_fn("geo_mean")
        assert_same_loss(
            lambda x, b=b: losses.aggregate(
                losses.geo_mean(x, b.old_logprob, b.group, b.mask, **CLIP).loss,
                b.mask,
                "seq-mean-token-mean",
                float(len(b.mask)),
            ),
            lambda x, b=b, loss=loss: loss(
                b.old_logprob, x, b.group, b.mask, "token-mean", config()
            )[0],
            b.logprob,
            1e-7,
        )


@pytest.mark.parametrize("mode", MODES)
def test_dro(mode):
    settings = config()
    settings.policy_loss = ActorConfig(dro_beta=0.3)
    for b in theirs.batches(empty_rows=True):
        assert_same_loss(
            lambda x, b=b: losses.aggregate(
                losses.dro(x, b.old_logprob, b.advantage, b.mask, beta=0.3).loss, b.mask, mode
            ),
            lambda x, b=b: theirs.verl().get_policy_loss_fn("dro")(
                b.old_logprob, x, b.advantage, b.mask, mode, settings
            )[0],
            b.logprob,
            1e-7,
        )


@pytest.mark.parametrize("mode", [*MODES, "seq-mean-token-sum-norm"])
def test_aggregation(mode):
    for b in theirs.batches(empty_rows=True):
        norm = {"max_length": 11.0} if mode.endswith("norm") else {}
        assert_same_loss(
            lambda x, b=b, norm=norm: losses.aggregate(x, b.mask, mode, **norm),
            lambda x, b=b, norm=norm: theirs.verl().agg_loss(
                x, b.mask, mode, loss_scale_factor=norm.get("max_length")
            ),
            b.logprob,
            1e-7,
        )


@pytest.mark.parametrize("kind", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "k3+"])
@pytest.mark.parametrize("apart", [1.0, 40.0], ids=("near", "beyond the limit"))
def test_kl(kind, apart):
    limit = 10.0 if kind.startswith(("low", "k3")) else None
    for b in theirs.batches():
        b = b._replace(ref_logprob=b.logprob + apart * (b.ref_logprob - b.logprob))
        assert_same_loss(
            lambda x, b=b: losses.aggregate(
                losses.kl(x, b.ref_logprob, b.mask, kind=kind, limit=limit), b.mask
            ),
            lambda x, b=b: theirs.verl().agg_loss(
                theirs.verl().kl_penalty(x, b.ref_logprob, kind), b.mask, "token-mean"
            ),
            b.logprob,
        )


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3"])
def test_token_kl_of_packed_tokens(kind):
    for b in theirs.batches():
        live = b.mask != 0
        assert_same_loss(
            lambda x, b=b, live=live: ops.token_kl(x[live], b.ref_logprob[live], kind=kind).sum(),
            lambda x, b=b: theirs.verl().agg_loss(
                theirs.verl().kl_penalty(x, b.ref_logprob, kind), b.mask, "token-sum"
            ),
            b.logprob,
        )


@pytest.mark.parametrize("mode", MODES)
def test_value_loss(mode):
    for b in theirs.batches(empty_rows=True):
        assert_same_loss(
            lambda x, b=b: losses.aggregate(
                losses.value_loss(x, b.old_value, b.reward, b.mask, clip=0.5).loss, b.mask, mode
            ),
            lambda x, b=b: theirs.verl().compute_value_loss(
                x, b.reward, b.old_value, b.mask, 0.5, mode
            )[0],
            b.value,
            1e-7,
        )


def packed(b: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are live, and where each sequence of them starts."""
    lengths = b.mask.sum(1).int()
    return b.mask != 0, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()


def test_the_fused_value_loss():
    for b in theirs.batches():
        live, _ = packed(b)
        weight = torch.full_like(b.value[live], 1 / live.sum().item())
        assert_same_loss(
            lambda x, b=b, live=live, weight=weight: (
                ops.value_loss(x[live], b.old_value[live], b.reward[live], weight, clip=0.5).loss
            ),
            lambda x, b=b: theirs.verl().compute_value_loss(x, b.reward, b.old_value, b.mask, 0.5)[
                0
            ],
            b.value,
        )


def test_the_fused_policy_loss():
    """From logits, with its gradient in them; theirs through their own log-probs."""
    policy = ops.PolicyLossConfig(clip_low=LOW, clip_high=HIGH, dual_clip=DUAL)
    for b in theirs.batches():
        live, _ = packed(b)
        logits = torch.randn(*b.mask.shape, 7, dtype=torch.float64)
        token = torch.randint(7, b.mask.shape)
        old = torch.log_softmax(logits, -1).gather(-1, token[..., None])[..., 0]
        old = old + b.old_logprob - b.logprob
        weight = torch.full_like(b.advantage[live], 1 / live.sum().item())

        def ours(x, b=b, live=live, token=token, old=old, weight=weight):
            return ops.policy_loss(
                x[live], token[live], old[live], b.advantage[live], weight, config=policy
            ).loss

        def verls(x, b=b, token=token, old=old):
            logprob = theirs.verl().verl_F.logprobs_from_logits(x, token)
            loss = theirs.verl().get_policy_loss_fn("vanilla")
            return loss(old, logprob, b.advantage, b.mask, "token-mean", config())[0]

        assert_same_loss(ours, verls, logits)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_skips_holes(gamma, lam):
    for b in theirs.batches():
        live, offsets = packed(b)
        if live.sum() < 2:  # they whiten what GAE gives, and refuse a single token
            continue
        advantage, returns = ops.gae(b.reward[live], b.value[live], offsets, gamma=gamma, lam=lam)
        want = theirs.verl().compute_gae_advantage_return(b.reward, b.value, b.mask, gamma, lam)
        torch.testing.assert_close(returns, want[1][live])
        torch.testing.assert_close(ops.whiten(advantage), want[0][live], rtol=1e-6, atol=1e-6)


def test_advantages_from_scores():
    """KL in the reward, the score at the last token, GAE, and advantages that are whitened."""
    for b in theirs.batches():
        live, offsets = packed(b)
        if live.sum() < 2:
            continue
        last = (b.mask * torch.arange(1, b.mask.shape[1] + 1)).argmax(1, keepdim=True)
        score = torch.zeros_like(b.mask).scatter(1, last, b.reward[:, :1])
        reward = theirs.verl().compute_rewards(score, b.logprob, b.ref_logprob, 0.05)
        want = theirs.verl().compute_gae_advantage_return(reward, b.value, b.mask, 0.99, 0.9)
        ours = ops.advantages(
            b.reward[:, 0].contiguous(),
            b.logprob[live],
            b.ref_logprob[live],
            b.value[live],
            offsets,
            kl_coef=0.05,
            gamma=0.99,
            lam=0.9,
        )
        torch.testing.assert_close(ours.reward_N, reward[live])
        torch.testing.assert_close(ours.return_N, want[1][live])
        torch.testing.assert_close(ours.advantage_N, want[0][live], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("lower", "upper"), [(None, 1.3), (0.8, 1.3)])
def test_rollout_correction(level, lower, upper):
    theirs_by = str(upper) if lower is None else f"{lower}_{upper}"
    mode = f"{level}_{'truncate' if lower is None else 'mask'}"
    for b in theirs.batches(empty_rows=True):
        ours = losses.importance_weights(
            b.logprob, b.old_logprob, b.mask, mode=mode, lower=lower, upper=upper
        )
        if not ours.any():  # their metrics divide by the sum of the weights
            continue
        weight, _ = theirs.verl_correction().compute_rollout_correction_weights(
            b.logprob - b.old_logprob, b.mask, level, theirs_by
        )
        torch.testing.assert_close(ours, weight.double())


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_advantages_by_group(kind):
    generator = torch.Generator().manual_seed(0)
    for _ in range(theirs.ROUNDS):
        reward = torch.randn(6, generator=generator, dtype=torch.float64)
        given = (reward[:, None].clone(), torch.ones(6, 1), np.array([0, 0, 0, 1, 1, 1]))
        if kind == "rloo":
            want, _ = theirs.verl().compute_rloo_outcome_advantage(*given)
        else:
            want, _ = theirs.verl().compute_grpo_outcome_advantage(
                *given, norm_adv_by_std_in_grpo=kind == "grpo"
            )
        ours = losses.group_advantages(reward, 3, kind=kind, eps=1e-6)
        torch.testing.assert_close(ours, want[:, 0].double())


@pytest.mark.parametrize("size", [2, 3, 8])
def test_filter_groups(size):
    """The groups that verl's replay buffer would drop, on rewards of which many are the same."""
    generator = torch.Generator().manual_seed(size)
    for _ in range(theirs.ROUNDS):
        # Quarters: numpy's deviation of equal ones is exactly 0, as their test of it asks for.
        score_B = torch.randint(3, (5 * size,), generator=generator) / 4
        groups = score_B.view(-1, size).tolist()
        dropped = theirs.verl_filtered_groups({str(i): group for i, group in enumerate(groups)})
        kept = {row // size for row in groups_that_differ(score_B, size)}
        assert {str(i) for i in range(5)} - dropped == {str(i) for i in kept}


def test_the_rule_of_gsm8k():
    """compute_score of verl on texts with and without marks, commas, signs and long tails."""
    score = theirs.verl_gsm8k()
    heads = ["", "#### 3 ", "####", "#### "]
    numbers = ["7", "-7", "1,000", "1000", "0.5", "$7", ".", "7.", "seven"]
    tails = ["", ".", " apples", "x" * 290, "x" * 310]
    texts = [
        f"{a}{mark}{n}{b}" for a in heads for mark in ("", "#### ") for n in numbers for b in tails
    ]
    for right in ("7", "-7", "1000", "0.5", "3", "7."):
        ours = exact(completions=texts, answer=[right] * len(texts))
        assert ours == [score(text, right) for text in texts]
        assert 0 < sum(ours) < len(texts)
