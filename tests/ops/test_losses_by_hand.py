"""`fastppo.ops.losses` with numbers that were worked out by hand, and what must hold of all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo.ops import losses, pack, value_loss
from fastppo.ops.losses import POLICY_LOSSES, SEQUENCE_LOSSES

NAN, INF = float("nan"), float("inf")
LOG = math.log


def t(*rows: Any) -> Tensor:
    return torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.float64)


def of_one(function: Any, ratio: float, old: float, advantage: float, **settings: Any) -> Any:
    """Loss, its derivative in the log-prob and the flags of one token with that ratio."""
    leaf = t([[LOG(old * ratio)]]).requires_grad_()
    found = function(leaf, t([[LOG(old)]]), t([[advantage]]), **settings)
    found.loss.sum().backward()
    return found.loss.item(), leaf.grad.item(), *(flag.item() for flag in found[1:])


NONE, LOW, HIGH, DUAL = (False,) * 3, (True, False, False), (False, True, False), (False,) * 2
CLIP = {"clip_low": 0.2, "clip_high": 0.3}
# Loss, ratio, old probability, advantage, settings; the loss, its slope in log p, and the flags.
BY_HAND = [
    # -A 1.3 where the ratio of 2 has gained all there is to gain
    ("ppo_clip", 2.0, 0.25, 1.0, CLIP, -1.3, 0.0, HIGH),
    ("ppo_clip", 0.5, 0.5, -1.0, CLIP, 0.8, 0.0, LOW),
    ("ppo_clip", 4.0, 0.125, -1.0, {**CLIP, "dual_clip": 3.0}, 3.0, 0.0, (*DUAL, True)),
    ("dr_grpo", 2.0, 0.25, 1.0, CLIP, -1.3, 0.0, HIGH),
    # a sequence of one token is a token
    ("gspo", 2.0, 0.25, 1.0, CLIP, -1.3, 0.0, HIGH),
    ("gspo_token", 1.2, 0.25, 1.0, CLIP, -1.2, -1.2, NONE),
    # the weight is 1.3, the gradient stays: -1.3 * A * log(1/2)
    ("cispo", 2.0, 0.25, 1.0, CLIP, 1.3 * LOG(2), -1.3, HIGH),
    ("cispo", 0.5, 0.5, 2.0, CLIP, 0.8 * 2 * LOG(4), -1.6, LOW),
    # at ratio 1 the gate is 4 / tau * 1/2 with slope 1, whatever tau
    ("sapo", 1.0, 0.25, 3.0, {"tau_pos": 2.0}, -3.0, -3.0, NONE),
    ("sapo", 1.0, 0.25, -3.0, {"tau_neg": 4.0}, 1.5, 3.0, NONE),
    # a temperature that float32 would round
    ("sapo", 1.0, 0.25, -1.0, {"tau_neg": 1.05}, 2 / 1.05, 1.0, NONE),
    # tau (ratio - 1) = log 3: sigmoid 3/4, slope 4 * 3/16 = 3/4 of the ratio
    ("sapo", 1 + LOG(3), 0.25, 1.0, {"tau_pos": 1.0}, -3.0, -0.75 * (1 + LOG(3)), NONE),
    # of 0.25 and 0.5 the probabilities differ by 0.25, of 0.001 and 0.01 by 0.009
    ("dppo_tv", 2.0, 0.25, 1.0, CLIP, 2 * LOG(2), -2.0, NONE),
    ("dppo_tv", 2.0, 0.25, 1.0, {"clip_high": 0.2}, 0.0, 0.0, HIGH),
    ("dppo_tv", 0.5, 0.5, -1.0, {"clip_low": 0.2}, 0.0, 0.0, LOW),
    ("dppo_tv", 0.5, 0.5, 1.0, {"clip_low": 0.2}, 0.5 * LOG(4), -0.5, NONE),  # it comes back
    ("dppo_tv", 10.0, 0.001, 1.0, {"ratio_limit": 4.0}, 4 * LOG(100), -4.0, (*DUAL, True)),
    # KL of (1/4, 3/4) to (1/2, 1/2) is log 2 - entropy of the former, 0.1308
    ("dppo_kl", 2.0, 0.25, 1.0, {"clip_high": 0.14}, 2 * LOG(2), -2.0, NONE),
    ("dppo_kl", 2.0, 0.25, 1.0, {"clip_high": 0.13}, 0.0, 0.0, HIGH),
    ("reinforce", 2.0, 0.25, 3.0, {}, 3 * LOG(2), -3.0, NONE),
]


@pytest.mark.parametrize(
    ("name", "ratio", "old", "a", "settings", "loss", "slope", "flags"), BY_HAND
)
def test_one_token(name, ratio, old, a, settings, loss, slope, flags):
    found = of_one(POLICY_LOSSES[name], ratio, old, a, **settings)
    assert found[:2] == pytest.approx((loss, slope), abs=1e-12)
    assert found[2:] == flags


def test_at_a_bound_itself_the_whole_gradient_flows():
    """torch.clamp has no gradient there from torch 2.14 on, and had it before."""
    old, bound = 0.25, LOG(0.5) - LOG(0.25)  # a ratio of 2 to the bit
    assert of_one(losses.ppo_clip, 2.0, old, 1.0, clip_high=1.0)[1] == pytest.approx(-2.0)
    assert of_one(losses.geo_mean, 2.0, old, 1.0, clip_high=bound)[1] == pytest.approx(-2.0)
    leaf = t([[LOG(0.5)]]).requires_grad_()
    losses.kl(leaf, t([[LOG(old)]]), kind="k1", limit=bound).sum().backward()
    assert leaf.grad.item() == 1.0


def test_every_loss_has_a_number_by_hand():
    assert {case[0] for case in BY_HAND} == set(POLICY_LOSSES)


def test_gspo_shares_the_gradient_of_a_sequence_and_gspo_token_does_not():
    """Log ratios log 4 and 0: the sequence's ratio is 2. Advantages 3 and 1, wide clip."""
    for function, slopes in ((losses.gspo, [-4.0, -4.0]), (losses.gspo_token, [-6.0, -2.0])):
        leaf = t([[LOG(0.8), LOG(0.5)]]).requires_grad_()
        found = function(leaf, t([[LOG(0.2), LOG(0.5)]]), t([[3.0, 1.0]]), clip_high=5.0)
        assert found.loss.tolist()[0] == pytest.approx([-6.0, -2.0])
        found.loss.sum().backward()
        assert leaf.grad[0].tolist() == pytest.approx(slopes)


def test_gspo_does_not_see_its_neighbours():
    """Two sequences of ratio 2 and 1/2, the second clipped from below."""
    given = (t([LOG(0.8), LOG(0.5), LOG(0.25)]), t([LOG(0.2), LOG(0.5), LOG(0.5)]))
    offsets = torch.tensor([0, 2, 2, 3])
    found = losses.gspo(*given, t([1.0, 1.0, -1.0]), offsets=offsets, clip_high=5.0)
    assert found.loss.tolist() == pytest.approx([-2.0, -2.0, 0.8])
    assert found.clipped_low.tolist() == [False, False, True]


LENGTHS = (3, 0, 5, 1)


def batch() -> dict[str, Tensor]:
    """Padded log-probs with holes in the mask."""
    generator = torch.Generator().manual_seed(3)
    mask_BT = torch.tensor(
        [[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0]]
    )
    lp, noise, advantage = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    lp = -lp.abs() - 0.1
    return {"lp": lp, "old": lp + 0.2 * noise, "advantage": advantage, "mask": mask_BT}


def call(name: str, given: dict[str, Tensor], **keywords: Any) -> Any:
    return POLICY_LOSSES[name](
        given["lp"], given["old"], given["advantage"], given["mask"], **keywords
    )


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_packed_is_padded(name):
    padded = batch()
    packing = pack(padded["mask"])
    packed = {key: packing.gather(x) for key, x in padded.items()}
    leaf, packed_leaf = (x["lp"].clone().requires_grad_() for x in (padded, packed))
    offsets = {"offsets": packing.offsets} if name in SEQUENCE_LOSSES else {}
    want = call(name, {**padded, "lp": leaf})
    got = call(name, {**packed, "lp": packed_leaf}, **offsets)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, packing.gather(b))
    (want.loss.square().sum() / 2).backward()
    (got.loss.square().sum() / 2).backward()
    torch.testing.assert_close(packed_leaf.grad, packing.gather(leaf.grad))


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_what_stands_outside_the_mask_does_no_harm(name, poison):
    clean, grads = batch(), []
    for filler in (0.0, poison):
        given = {
            k: x if k == "mask" else x.masked_fill(clean["mask"] == 0, filler)
            for k, x in clean.items()
        }
        leaf = given["lp"].clone().requires_grad_()
        found = call(name, {**given, "lp": leaf})
        found.loss.sum().backward()
        grads.append((found.loss.detach(), leaf.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
        assert not b[clean["mask"] == 0].any()


# The value of cispo, dppo and reinforce has factors without gradient: numbers by hand above.
SMOOTH = ("ppo_clip", "dr_grpo", "gspo", "sapo")


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_those_of_the_values(name):
    given = batch()
    leaf = given["lp"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda lp: call(name, {**given, "lp": lp}).loss, (leaf,))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_on_policy_the_gradient_is_the_policy_gradient(name):
    """Ratio 1 whatever the log-prob: -A for each live token, or shared within a sequence."""
    given = batch()
    leaf = given["lp"].clone().requires_grad_()
    advantage = given["advantage"][:, :1].expand(4, 6)
    call(name, {**given, "lp": leaf, "old": None, "advantage": advantage}).loss.sum().backward()
    torch.testing.assert_close(leaf.grad, -advantage * given["mask"])


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_an_advantage_a_sequence_is_that_of_its_tokens(name):
    given = batch()
    one_B = given["advantage"][:, 0]
    want = call(name, {**given, "advantage": one_B[:, None].expand(4, 6)}).loss
    assert torch.equal(call(name, {**given, "advantage": one_B}).loss, want)
    assert torch.equal(call(name, {**given, "advantage": one_B[:, None]}).loss, want)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_token_that_cannot_be_sampled_passes_no_gradient(name):
    given = batch()
    given["lp"][0, 2] = -INF
    leaf = given["lp"].clone().requires_grad_()
    loss = call(name, {**given, "lp": leaf}).loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert leaf.grad.isfinite().all()
    assert leaf.grad[0, 2] == 0


D = LOG(2)  # the policy's probability is twice the reference's
KINDS = [
    ("k1", {}, D, 1.0),
    ("kl", {}, D, 1.0),
    ("abs", {}, D, 1.0),
    ("k2", {}, D * D / 2, D),
    ("mse", {}, D * D / 2, D),
    ("k3", {}, 0.5 - 1 + D, 0.5),  # 1/2 - 1 + log 2, whose slope is 1 - 1/2
    ("low_var_kl", {}, 0.5 - 1 + D, 0.5),
    # the value of one, the gradient of k2
    ("k1+", {}, D, D),
    ("k3+", {}, 0.5 - 1 + D, D),
    ("low_var_kl", {"straight_through": True}, 0.5 - 1 + D, D),
    # times the ratio, whose own slope it adds: on-policy k + k'
    ("k1", {"bias_correction": True}, D, 1 + D),
    ("k3", {"bias_correction": True}, 0.5 - 1 + D, D),
    # the limit takes the gradient with it, but not k2's, which is the KL's own
    ("k1", {"limit": 0.5}, 0.5, 0.0),
    ("k3", {"limit": 0.15}, 0.15, 0.0),
    ("k3+", {"limit": 0.15}, 0.15, D),
    ("k3", {"log_ratio_limit": 0.5}, math.exp(-0.5) - 0.5, 0.0),
]


@pytest.mark.parametrize(("kind", "settings", "value", "slope"), KINDS)
def test_kl_by_hand(kind, settings, value, slope):
    leaf = t([LOG(0.5), NAN]).requires_grad_()
    found = losses.kl(leaf, t([LOG(0.25), INF]), torch.tensor([1, 0]), kind=kind, **settings)
    found.sum().backward()
    assert found.tolist() == pytest.approx([value, 0.0])
    assert leaf.grad.tolist() == pytest.approx([slope, 0.0])


def test_a_corrected_kl_of_a_moved_policy():
    """Ratio 2 to the old policy: twice k3, and its slope 2 (k3 + 1/2)."""
    leaf = t([LOG(0.5)]).requires_grad_()
    given = {"bias_correction": True, "old_logprob": t([LOG(0.25)])}
    found = losses.kl(leaf, t([LOG(0.25)]), **given)
    found.sum().backward()
    assert found.item() == pytest.approx(2 * D - 1)
    assert leaf.grad.item() == pytest.approx(2 * D)


WEIGHTS = [  # of ratios 4, 1, 1/2 in one sequence (product 2) and 1/4 in another
    ("token_truncate", None, 2.0, [2.0, 1.0, 0.5, 0.25]),
    ("token_truncate", 0.5, 2.0, [2.0, 1.0, 0.5, 0.5]),
    ("token_mask", 0.4, 2.0, [0.0, 1.0, 0.5, 0.0]),
    ("token_mask", 0.4, None, [4.0, 1.0, 0.5, 0.0]),
    ("sequence_truncate", None, 1.5, [1.5, 1.5, 1.5, 0.25]),
    ("sequence_mask", None, 3.0, [2.0, 2.0, 2.0, 0.25]),
    ("sequence_mask", 0.5, 3.0, [2.0, 2.0, 2.0, 0.0]),
]


@pytest.mark.parametrize(("mode", "lower", "upper", "expected"), WEIGHTS)
def test_importance_weights_by_hand(mode, lower, upper, expected):
    ratio, bounds = t([4.0, 1.0, 0.5, 0.25]), {"mode": mode, "lower": lower, "upper": upper}
    sampler = t([-1.0, -2.0, -3.0, -4.0])
    offsets = torch.tensor([0, 3, 4])
    packed = losses.importance_weights(
        (sampler + ratio.log()).requires_grad_(), sampler, offsets=offsets, **bounds
    )
    assert packed.tolist() == pytest.approx(expected)
    assert not packed.requires_grad
    padded = torch.full((2, 4), NAN, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]])
    padded_sampler = padded.masked_scatter(mask == 1, sampler)
    logprob = padded.masked_scatter(mask == 1, sampler + ratio.log())
    found = losses.importance_weights(logprob, padded_sampler, mask, **bounds)
    assert found[mask == 1].tolist() == pytest.approx(expected)
    assert not found[mask == 0].any()


def test_the_product_of_a_long_sequence_does_not_overflow():
    logprob, sampler = torch.zeros(1, 1000), torch.full((1, 1000), -1.0)
    bounds: dict[str, Any] = {"mode": "sequence_truncate", "upper": 2.0}
    assert losses.importance_weights(logprob, sampler, **bounds).unique().tolist() == [2.0]


MASK = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])  # 3 tokens, none, 1
MODES = [
    ("token-mean", {}, [1 / 4] * 4),
    ("dapo", {"denominator": 8}, [1 / 8] * 4),
    ("bnpo", {}, [1 / 4] * 4),
    ("token-sum", {}, [1.0] * 4),
    ("seq-mean-token-mean", {}, [1 / 6, 1 / 6, 1 / 6, 1 / 2]),
    ("grpo", {"denominator": 3}, [1 / 9, 1 / 9, 1 / 9, 1 / 3]),  # the empty one counted too
    ("seq-mean-token-sum", {}, [1 / 2] * 4),
    ("seq-mean-token-sum-norm", {"max_length": 4}, [1 / 8] * 4),
    ("dr_grpo", {"denominator": torch.tensor(5.0), "max_length": 2}, [1 / 10] * 4),
]


@pytest.mark.parametrize(("mode", "settings", "expected"), MODES)
def test_aggregation_by_hand(mode, settings, expected):
    found = losses.weights(MASK, mode, **settings)
    assert found[MASK == 1].tolist() == pytest.approx(expected)
    assert not found[MASK == 0].any()
    offsets = torch.tensor([0, 3, 3, 4])
    packed = losses.weights(torch.ones(4), mode, offsets=offsets, **settings)
    assert packed.tolist() == pytest.approx(expected)
    loss = t([[1.0, NAN, 2.0, 3.0], [NAN] * 4, [NAN, 4.0, INF, NAN]]).requires_grad_()
    total = losses.aggregate(loss, MASK, mode, **settings)
    assert total.item() == pytest.approx(sum(w * i for i, w in enumerate(expected, 1)))
    total.backward()
    torch.testing.assert_close(loss.grad, found.double())


def test_micro_batches_add_up_with_the_steps_denominator():
    loss = torch.arange(12.0).view(3, 4)
    for mode, denominator in (("token-mean", 4), ("seq-mean-token-mean", 2)):
        whole = losses.aggregate(loss, MASK, mode)
        parts = [
            losses.aggregate(loss[i : i + 1], MASK[i : i + 1], mode, denominator) for i in (0, 1, 2)
        ]
        torch.testing.assert_close(sum(parts), whole)


def test_nothing_live_is_nothing_and_not_nan():
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        assert losses.aggregate(torch.full((2, 3), NAN), torch.zeros(2, 3), mode).item() == 0


def test_value_loss_by_hand():
    """Return 1, old value 0, clip 0.2: a value of 0.5 counts as 0.2, one of -0.5 as itself."""
    leaf = t([[0.5, -0.5, 0.1, NAN]]).requires_grad_()
    old, goal = t([[0.0, 0.0, 0.0, NAN]]), t([[1.0, 1.0, 1.0, INF]])
    mask = torch.tensor([[True, True, True, False]])
    found = losses.value_loss(leaf, old, goal, mask)
    assert found.loss[0].tolist() == pytest.approx([0.32, 1.125, 0.405, 0.0])
    assert found.clipped[0].tolist() == [True, False, False, False]
    found.loss.sum().backward()
    assert leaf.grad[0].tolist() == pytest.approx([0.0, -1.5, -0.9, 0.0])
    plain = losses.value_loss(leaf.detach(), None, goal, mask, clip=None)
    assert plain.loss[0].tolist() == pytest.approx([0.125, 1.125, 0.405, 0.0])


def test_the_operator_is_its_weighted_sum(backend):
    v, old, goal = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0, 1, 50)
    found = losses.value_loss(v, old, goal, weight)
    got = value_loss(v, old, goal, weight, backend=backend)
    torch.testing.assert_close(got.loss, losses.aggregate(weight * found.loss, mode="token-sum"))
    assert got.metrics.clipped_sum == found.clipped.sum()


GROUPS = [  # rewards 1, 3 and 6, 6: means 2 and 6, std sqrt(2) and 0
    ("grpo", {"eps": 0.0, "scale": "none"}, [-1.0, 1.0, 0.0, 0.0]),
    ("grpo", {"eps": 1.0}, [-1 / (1 + 2**0.5), 1 / (1 + 2**0.5), 0.0, 0.0]),
    ("grpo", {"eps": 0.0, "scale": "batch"}, [-1 / 6**0.5, 1 / 6**0.5, 0.0, 0.0]),  # variance 18/3
    ("dr_grpo", {}, [-1.0, 1.0, 0.0, 0.0]),
    ("rloo", {}, [-2.0, 2.0, 0.0, 0.0]),
    ("reinforce++_baseline", {}, [-1.0, 1.0, 0.0, 0.0]),
]


@pytest.mark.parametrize(("kind", "settings", "expected"), GROUPS)
def test_group_advantages_by_hand(kind, settings, expected):
    found = losses.group_advantages(t([1.0, 3.0, 6.0, 6.0]), 2, kind=kind, **settings)
    assert found.tolist() == pytest.approx(expected)


GIVEN = (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
REFUSED = [
    (
        lambda: losses.ppo_clip(*GIVEN, mask=torch.ones(3)),
        r"ppo_clip: mask must have shape \(2, 3\)",
    ),
    (lambda: losses.ppo_clip(GIVEN[0], GIVEN[0], torch.zeros(3)), "advantage must have shape"),
    (lambda: losses.ppo_clip(GIVEN[0], torch.zeros(6), GIVEN[0]), "old_logprob must have shape"),
    (
        lambda: losses.ppo_clip(torch.zeros(1, 2, 3), None, GIVEN[0]),
        r"must be \(B, T\) with a mask",
    ),
    (lambda: losses.ppo_clip(*GIVEN, clip_low=-1), "clip_low must be >= 0, came -1"),
    (lambda: losses.ppo_clip(*GIVEN, dual_clip=1.0), "dual_clip must be > 1 "),
    (lambda: losses.sapo(*GIVEN, tau_neg=0.0), "sapo: tau_neg must be > 0, came 0.0"),
    (lambda: losses.dppo(*GIVEN, divergence="js"), "divergence must be one of tv, kl, came 'js'"),
    (lambda: losses.gspo(*(x.flatten() for x in GIVEN)), "gspo: offsets are needed with packed"),
    (lambda: losses.gspo(*GIVEN, offsets=torch.tensor([0, 6])), "offsets belong to packed"),
    (lambda: losses.kl(*GIVEN[:2], kind="k4"), "kl: KL kind must be one of .*, came 'k4'"),
    (lambda: losses.kl(*GIVEN[:2], kind="k3+", bias_correction=True), "correct the same; keep one"),
    (lambda: losses.kl(*GIVEN[:2], old_logprob=GIVEN[0]), "old_logprob acts with bias_correction"),
    (lambda: losses.importance_weights(*GIVEN[:2]), "one of lower and upper is needed"),
    (lambda: losses.importance_weights(*GIVEN[:2], mode="tis", upper=2.0), "came 'tis'"),
    (lambda: losses.importance_weights(*GIVEN[:2], lower=3.0, upper=2.0), "lower <= upper"),
    (lambda: losses.weights(MASK, "mean"), "mode must be one of token-mean, .*, came 'mean'"),
    (lambda: losses.weights(MASK, "dr_grpo"), "max_length is needed by mode 'dr_grpo'"),
    (
        lambda: losses.weights(MASK, max_length=3),
        "max_length has no meaning with mode 'token-mean'",
    ),
    (lambda: losses.weights(MASK, denominator=0), "denominator must be > 0, came 0"),
    (lambda: losses.value_loss(GIVEN[0], None, GIVEN[0]), "old_value is needed"),
    (
        lambda: losses.group_advantages(torch.zeros(5), 2),
        "group_size must be at least 2 and divide",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as raised:
        wrong()
    assert "\n" not in str(raised.value)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="ppo_clip: logprob must hold floats, came "):
        losses.ppo_clip(torch.zeros(2, 3, dtype=torch.long), *GIVEN[1:])


@pytest.mark.slow  # the fast tier compiles the losses that are operators, in test_surrogate.py
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_compiled_whole_it_gives_the_same(name):
    torch._dynamo.reset()
    packing = pack(batch()["mask"])
    packed = {key: packing.gather(x) for key, x in batch().items()}
    offsets = {"offsets": packing.offsets} if name in SEQUENCE_LOSSES else {}

    def total(lp: Tensor) -> Tensor:
        found = call(name, {**packed, "lp": lp}, **offsets)
        kl = losses.kl(lp, packed["old"], packed["mask"])
        return losses.aggregate(found.loss + 0.1 * kl, packed["mask"])

    grads = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        leaf = packed["lp"].clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
