"""verl 0.9.1's fused head and registered policy losses, and ours in their place."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch

from benchmarks import peers
from tests.integrations import verl_ranks
from tests.ops.ranks import on_ranks
from tests.peers import theirs
from tests.peers.theirs import ActorConfig

pytestmark = pytest.mark.peers

# Our loss -> the one of verl's that it equals.
SAME = {
    "ppo_clip": "vanilla",
    "gspo_token": "gspo",
    "cispo": "cispo",
    "sapo": "sapo",
    "dppo_tv": "dppo_tv",
    "dppo_kl": "dppo_kl",
    "reinforce": "gpg",
}


@pytest.fixture(scope="module")
def loaded():
    """Our module on verl's two, loaded without the package around them; and verl's own head."""
    core = theirs.verl()
    functional = peers.load("verl", "verl.utils.experimental.torch_functional")
    own = functional.FusedLinearForPPO.forward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = importlib.import_module("fastppo.integrations.verl")
    yield core, functional, own, ours
    functional.FusedLinearForPPO.forward = own
    module = peers.load("verl", "verl.utils.kernel.linear_cross_entropy")
    module.linear_cross_entropy = ours.THEIR_CROSS_ENTROPY


def results(loss, b, config, weights):
    leaf = b.logprob.clone().requires_grad_()
    value, metrics = loss(
        old_log_prob=b.old_logprob,
        log_prob=leaf,
        advantages=b.advantage,
        response_mask=b.mask,
        loss_agg_mode="seq-mean-token-mean",
        config=config,
        rollout_is_weights=weights,
    )
    return value.detach(), torch.autograd.grad(value, leaf)[0], metrics


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "same"), SAME.items())
def test_losses(loaded, name, same, weighted):
    """By verl's registry and with the keywords of its caller; counts of a global batch too."""
    core, *_ = loaded
    config = ActorConfig(
        clip_ratio=0.2,
        clip_ratio_low=None,
        clip_ratio_high=0.28,
        clip_ratio_c=3.0,
        tau_pos=1.0,
        tau_neg=1.05,
        global_batch_info={"dp_size": 2, "global_batch_size": 8},
    )
    mine, other = core.get_policy_loss_fn(f"fastppo_{name}"), core.get_policy_loss_fn(same)
    for b in theirs.batches():
        weights = b.value.abs() if weighted else None
        found = results(mine, b, config, weights)
        expected = results(other, b, config, weights)
        for x, y in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(x.double(), y.double(), rtol=1e-6, atol=1e-7)
        if same == "vanilla":
            assert found[2].keys() == expected[2].keys()
            for key, value in expected[2].items():
                assert found[2][key] == pytest.approx(value, abs=1e-6), key


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_fused_head(loaded, temperature):
    """Log-probs, entropies and gradients, also where the entropy alone is in the loss."""
    _, functional, own, _ = loaded
    head = functional.FusedLinearForPPO()
    for seed in range(20):
        torch.manual_seed(seed)
        ids = torch.randint(13, (2, 5))
        states, words = torch.randn(2, 5, 8), torch.randn(13, 8)
        g, h = torch.randn(2, 2, 5)
        found = []
        for forward in (functional.FusedLinearForPPO.forward, own):
            hidden, weight = states.clone().requires_grad_(), words.clone().requires_grad_()
            logprob, entropy = forward(head, hidden, weight, ids, temperature)
            loss = (h * entropy).sum() + (0 if seed % 2 else (g * logprob).sum())
            found.append([logprob, entropy, *torch.autograd.grad(loss, (hidden, weight))])
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_another_backend_stays_verls(loaded, monkeypatch):
    _, functional, _, ours = loaded
    monkeypatch.setattr(ours, "THEIRS", lambda *_: "theirs")
    head = functional.FusedLinearForPPO(impl_backend="liger")
    assert head(torch.randn(1, 2, 3), torch.randn(5, 3), torch.zeros(1, 2)) == "theirs"


def test_the_head_of_ranks_that_share_the_vocabulary_out(tmp_path):
    """What verl's Megatron engine calls, against verl's head over all words."""
    one, other = on_ranks(verl_ranks.heads, 2, tmp_path)
    for found in (one, other):
        for mine, whole in zip(found["ours"][:2], found["verl"][:2], strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)
    # Their engine gathers hidden states of parts of a sequence, and that adds up the gradients.
    hidden = one["ours"][2] + other["ours"][2]
    weight = torch.cat([one["ours"][3], other["ours"][3]])
    for mine, whole in zip((hidden, weight), one["verl"][2:], strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)


def test_the_head_without_ranks_stays_verls(loaded, monkeypatch):
    *_, ours = loaded
    monkeypatch.setattr(ours, "THEIR_CROSS_ENTROPY", lambda *_: "theirs")
    module = peers.load("verl", "verl.utils.kernel.linear_cross_entropy")
    assert module.linear_cross_entropy is ours.sharded_head
    assert ours.sharded_head(torch.randn(2, 3), torch.randn(5, 3), torch.zeros(2)) == "theirs"
