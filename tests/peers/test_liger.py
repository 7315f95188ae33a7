"""Liger-Kernel 0.8.5's GRPO losses and its scaled cross-entropy, held against ours."""

from __future__ import annotations

import pytest
import torch

from fastppo import ops
from fastppo.ops import losses
from tests.peers import theirs
from tests.peers.theirs import BETA, CLIP, GRPO_LOSSES, HIGH, LENGTH, LOW, Batch, assert_same_loss

pytestmark = pytest.mark.peers

# Their luspo lets padding carry the KL: it stands apart below.
LOSSES = {name: loss for name, loss in GRPO_LOSSES.items() if name[0] != "luspo"}


def aggregate(loss, b: Batch, mode: str):
    """Their number of sequences is that of the batch, rows without a token among them."""
    norm = {"max_length": float(LENGTH)} if mode.endswith("norm") else {}
    rows = float(len(b.mask)) if mode.startswith("seq") else None
    return losses.aggregate(loss, b.mask, mode, rows, **norm)


def liger_loss(x, b: Batch, kind: str, level: str, **keywords):
    return theirs.liger("chunked_loss.grpo_loss").LigerFusedLinearGRPOFunction.ppo_loss_fn(
        x,
        b.mask,
        b.advantage_B,
        b.mask,
        ref_per_token_logps=b.ref_logprob,
        old_per_token_logps=b.old_logprob,
        epsilon_low=LOW,
        epsilon_high=5.0 if kind == "cispo" else HIGH,
        loss_type=kind,
        max_completion_length=LENGTH,
        importance_sampling_level=level,
        **keywords,
    )[0]


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize(("kind", "level"), LOSSES)
def test_losses(kind, level, beta):
    loss, mode = LOSSES[kind, level]
    for b in theirs.batches(empty_rows=True):

        def ours(x, b=b):
            total = aggregate(loss(x, b.old_logprob, b.group, b.mask).loss, b, mode)
            if beta:
                total = total + beta * aggregate(losses.kl(x, b.ref_logprob, b.mask), b, mode)
            return total

        assert_same_loss(ours, lambda x, b=b: liger_loss(x, b, kind, level, beta=beta), b.logprob)


def test_two_sided_clip_and_corrected_kl():
    """Their delta is our dual_clip; use_bias_correction_kl our bias_correction."""
    for b in theirs.batches():

        def ours(x, b=b):
            clipped = losses.ppo_clip(x, b.old_logprob, b.group, b.mask, **CLIP, dual_clip=1.5)
            kl = losses.kl(
                x, b.ref_logprob, b.mask, bias_correction=True, old_logprob=b.old_logprob
            )
            return losses.aggregate(clipped.loss + BETA * kl, b.mask)

        assert_same_loss(
            ours,
            lambda x, b=b: liger_loss(
                x, b, "dapo", "token", beta=BETA, delta=1.5, use_bias_correction_kl=True
            ),
            b.logprob,
        )


def test_luspo_without_kl_is_gspo_summed_over_tokens():
    for b in theirs.batches():
        assert_same_loss(
            lambda x, b=b: aggregate(
                losses.gspo(x, b.old_logprob, b.group, b.mask, **CLIP).loss,
                b,
                "seq-mean-token-sum",
            ),
            lambda x, b=b: liger_loss(x, b, "luspo", "sequence", beta=0.0),
            b.logprob,
        )


def test_their_luspo_lets_padding_carry_the_gradient_of_the_kl():
    """The KL is of each token there, and no mask is put on it; ours is 0 outside the mask."""
    logprob, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    b = Batch(logprob, logprob, ref, *[torch.ones(1, 2)] * 4, torch.tensor([[1.0, 0.0]]))
    _, gradient = theirs.value_and_gradient(
        lambda x: liger_loss(x, b, "luspo", "sequence", beta=1.0), logprob
    )
    assert gradient[0, 1].abs() > 0.1
    _, ours = theirs.value_and_gradient(lambda x: losses.kl(x, ref, b.mask).sum(), logprob)
    assert ours[0, 1] == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scaled_cross_entropy(temperature):
    """Log-prob and entropy, with gradients of both in hidden states and head; -100 is ignored."""
    apply = theirs.liger(
        "ops.fused_linear_scaled_cross_entropy"
    ).LigerFusedLinearScaledCrossEntropyFunction.apply
    for seed in range(theirs.ROUNDS):
        torch.manual_seed(seed)
        hidden, weight = torch.randn(6, 4), torch.randn(11, 4)
        token = torch.randint(11, (6,)).masked_fill(torch.rand(6) < 0.3, -100)
        g, h = torch.randn(2, 6)

        def ours(hidden, weight, token=token, g=g, h=h):
            found = ops.linear_token_logprobs(
                hidden, weight, token, temperature=temperature, entropy_grad=True
            )
            return (g * found.logprob_N + h * found.entropy_N).sum()

        def ligers(hidden, weight, token=token, g=g, h=h):
            nll, entropy = apply(hidden, weight, token, temperature, return_entropy=True)
            return (-g * nll + h * entropy).sum()

        for loss in (0, 1):
            fixed = (hidden, weight)[1 - loss]
            order = (lambda x, y: (x, y)) if loss == 0 else (lambda x, y: (y, x))
            assert_same_loss(
                lambda x, f=fixed, order=order, ours=ours: ours(*order(x, f)),
                lambda x, f=fixed, order=order, ligers=ligers: ligers(*order(x, f)),
                (hidden, weight)[loss],
                1e-4,
            )


@pytest.mark.parametrize(("kind", "level"), LOSSES)
def test_the_fused_module_from_hidden_states(kind, level):
    """Theirs whole, uncompiled; ours is linear_token_logprobs, a loss of it, and an aggregation."""
    module = theirs.liger("chunked_loss.grpo_loss").LigerFusedLinearGRPOLoss(
        beta=BETA,
        compiled=False,
        use_ref_model=True,
        epsilon_low=LOW,
        epsilon_high=5.0 if kind == "cispo" else HIGH,
        loss_type=kind,
        max_completion_length=LENGTH,
        importance_sampling_level=level,
    )
    loss, mode = LOSSES[kind, level]
    for i, b in enumerate(theirs.batches()):
        torch.manual_seed(i)
        rows, length = b.mask.shape
        hidden, weight = torch.randn(rows, length, 4), torch.randn(7, 4)
        token = torch.randint(7, (rows, length))
        with torch.no_grad():
            at = torch.log_softmax(hidden @ weight.T, -1).gather(-1, token[..., None])[..., 0]
        old, ref = (at + (x - b.logprob).float() for x in (b.old_logprob, b.ref_logprob))
        mask, advantage = b.mask.float(), b.advantage_B.float()

        def ours(x, b=b, token=token, weight=weight, old=old, ref=ref, mask=mask):
            found = ops.linear_token_logprobs(x.reshape(-1, 4), weight, token.reshape(-1))
            logprob = found.logprob_N.view_as(mask)
            value = loss(logprob, old, b.group.float(), mask).loss
            value = value + BETA * losses.kl(logprob, ref, mask)
            return aggregate(value, b, mode)

        assert_same_loss(
            ours,
            lambda x, w=weight, t=token, m=mask, a=advantage, ref=ref, old=old: module(
                x, w, t, m, a, ref_per_token_logps=ref, old_per_token_logps=old
            )[0],
            hidden,
            1e-4,
        )
