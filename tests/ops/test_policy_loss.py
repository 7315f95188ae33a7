"""The clipped loss: by hand, its edges, its weights, in place, and what it refuses."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from fastppo.ops import PolicyLossConfig, policy_loss
from tests.ops.references import policy_loss_reference
from tests.ops.registry import OPS, Shape

F64 = torch.float64
INF = float("inf")


def make(n=13, vocab=37, seed=0):
    return OPS["policy_loss"].make_inputs(Shape(n=n, vocab=vocab, batch=3), F64, seed)


def loss_and_grad(function, inputs, **changes):
    inputs = {**inputs, **changes}
    logits = inputs.pop("logits_NV").clone().requires_grad_()
    result = function(logits, **inputs)
    result.loss.backward()
    return result, logits.grad


def two_way(ratio, advantage, **settings):
    """One token of a two-word vocabulary, sampled with probability 1/2, whose ratio is as given."""
    logits = torch.zeros(1, 2, dtype=F64, requires_grad=True)
    behaviour = torch.tensor([math.log(0.5) - math.log(ratio)], dtype=F64)
    result = policy_loss(
        logits,
        torch.tensor([0]),
        behaviour,
        torch.tensor([advantage], dtype=F64),
        torch.ones(1, dtype=F64),
        **settings,
    )
    result.loss.backward()
    # d logprob / d logits = (1 - p, -p) = (1/2, -1/2)
    return result.loss.item(), logits.grad[0, 0].item() / 0.5, result


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),  # -A rho; slope -A rho
        (1.1, 2.0, -2.2, -2.2),  # inside the clip
        (1.5, 2.0, -2.4, 0.0),  # -A 1.2: no more to gain
        (0.5, 2.0, -1.0, -1.0),  # worse than the clip: full gradient back
        (0.5, -2.0, 1.6, 0.0),  # -A 0.8
        (1.5, -2.0, 3.0, 3.0),  # the unclipped is the worse
    ],
)
def test_the_four_corners_of_the_clip_by_hand(ratio, advantage, loss, slope):
    got, grad, result = two_way(ratio, advantage)
    assert got == pytest.approx(loss, abs=1e-12)
    assert grad == pytest.approx(slope, abs=1e-12)
    assert result.metrics.clipped_sum.item() == (slope == 0.0)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.75, 0.79, 0.81, 0.9, 1.1, 1.19, 1.21, 1.3])
def test_28_clip_edges_by_finite_differences(ratio, advantage):
    step = 1e-6
    up, _, _ = two_way(ratio * math.exp(step), advantage)
    down, _, _ = two_way(ratio * math.exp(-step), advantage)
    _, slope, _ = two_way(ratio, advantage)
    assert slope == pytest.approx((up - down) / (2 * step), abs=1e-5)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_28_at_ratio_1_the_full_gradient_flows(advantage):
    assert two_way(1.0, advantage)[1] == pytest.approx(-advantage, abs=1e-12)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.8, 1.2])
def test_28_at_the_very_edge_the_full_gradient_flows(ratio, advantage):
    # exp rounds, so the edge is laid where the ratio came out: 1 +- (r - 1) is r to the bit.
    came = two_way(ratio, advantage)[2].metrics.ratio_max.item()
    for inward, slope in ((0.0, -advantage * came), (1e-9, 0.0)):
        width = abs(came - 1) - inward
        config = PolicyLossConfig(clip_low=width, clip_high=width)
        at_risk = (came > 1) == (advantage > 0)  # the other edge never clips
        _, got, result = two_way(ratio, advantage, config=config)
        assert got == pytest.approx(slope if at_risk else -advantage * came, abs=1e-12)
        assert result.metrics.clipped_sum.item() == (at_risk and inward > 0)


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    config = PolicyLossConfig(dual_clip=3.0)
    assert two_way(5.0, -2.0, config=config)[:2] == pytest.approx((6.0, 0.0))
    assert two_way(2.0, -2.0, config=config)[:2] == pytest.approx((4.0, 4.0))
    assert two_way(5.0, 2.0, config=config)[0] == pytest.approx(-2.4)


def test_clip_higher_moves_the_upper_edge_alone():
    config = PolicyLossConfig(clip_low=0.2, clip_high=0.28)
    assert two_way(1.25, 2.0, config=config)[1] == pytest.approx(-2.5)
    assert two_way(1.3, 2.0, config=config)[:2] == pytest.approx((-2.56, 0.0))


def test_29_log_ratio_of_100_is_finite_and_counted():
    loss, slope, result = two_way(math.exp(100.0), -1.0)
    assert loss == pytest.approx(math.exp(20.0))  # the limit
    assert slope == 0.0
    assert result.metrics.clamped_sum.item() == 1
    loss, slope, result = two_way(math.exp(-100.0), 1.0)
    assert loss == pytest.approx(-math.exp(-20.0))
    assert result.metrics.clamped_sum.item() == 1


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_setting_against_the_definition(kind, level):
    config = PolicyLossConfig(
        clip_low=0.1, clip_high=0.3, dual_clip=2.0, kl_kind=kind, ratio_level=level
    )
    generator = torch.Generator().manual_seed(1)
    changes = {
        "config": config,
        "kl_coef": torch.tensor(0.3, dtype=F64),
        "entropy_coef": 0.05,
        "offsets": torch.tensor([0, 1, 5, 13], dtype=torch.int32),
        "importance_weight_N": torch.rand(13, generator=generator, dtype=F64),
        "temperature": 0.5 + torch.rand(13, generator=generator, dtype=F64),
        "softcap": 4.0,
        "weight_N": torch.rand(13, generator=generator, dtype=F64) * (torch.arange(13) % 5 != 2),
    }
    got, got_grad = loss_and_grad(policy_loss, make(), **changes)
    want, want_grad = loss_and_grad(policy_loss_reference, make(), **changes)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got.kl_N, want.kl_N, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got_grad, want_grad, atol=1e-12, rtol=1e-12)


def test_a_coefficient_as_a_0_d_tensor_is_the_float_to_the_bit():
    floats = {"kl_coef": 0.3, "entropy_coef": 0.05}
    of_tensors = {name: torch.tensor(x, dtype=F64) for name, x in floats.items()}
    config = PolicyLossConfig(**floats)  # and so is the configuration's
    rest = {k: x for k, x in make().items() if k not in floats}
    want, want_grad = loss_and_grad(policy_loss, rest, **floats)
    for changes in (of_tensors, {"config": config}):
        got, grad = loss_and_grad(policy_loss, rest, **changes)
        assert got.loss == want.loss
        assert torch.equal(grad, want_grad)


def test_masked_vocabulary_is_as_if_it_were_not_there():
    settings = {"softcap": 4.0, "temperature": 0.7}
    want, want_grad = loss_and_grad(policy_loss, make(), **settings)
    wide = torch.cat([make()["logits_NV"], torch.full((13, 5), -INF, dtype=F64)], 1)
    got, grad = loss_and_grad(policy_loss, make(), logits_NV=wide, **settings)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-14, rtol=0)
    torch.testing.assert_close(grad[:, :37], want_grad, atol=1e-14, rtol=0)
    assert not grad[:, 37:].any()


@pytest.mark.parametrize("cut", [(slice(None, None, 2), slice(37)), (slice(7), slice(4, None, 2))])
@pytest.mark.parametrize("inplace", [False, True])
def test_strided_logits_give_the_same_to_the_bit(cut, inplace):
    base = torch.randn(14, 80, generator=torch.Generator().manual_seed(2), dtype=F64)
    rest = make(n=7, vocab=37)
    want, want_grad = loss_and_grad(policy_loss, {**rest, "logits_NV": base[cut].contiguous()})
    del rest["logits_NV"]
    leaf = base.requires_grad_()
    result = policy_loss((leaf * 1.0)[cut], **rest, inplace=inplace)
    result.loss.backward()
    assert result.loss == want.loss
    assert torch.equal(leaf.grad[cut], want_grad)
    leaf.grad[cut] = 0
    assert not leaf.grad.any()


AGGREGATIONS = {  # weight of a token in a batch of 3 sequences of 2, 1 and 4 tokens, padded to 5
    "token-mean": lambda length: 1 / 7,
    "seq-mean-token-mean": lambda length: 1 / (3 * length),
    "seq-mean-token-sum": lambda length: 1 / 3,
    "seq-mean-token-sum-norm": lambda length: 1 / (3 * 5),
}


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_weights_are_the_aggregation(kind):
    lengths = [2, 1, 4]
    inputs = {**make(n=7), "kl_coef": 0.0, "entropy_coef": 0.0}
    losses = [
        policy_loss(
            **{k: x[i : i + 1] if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
            | {"weight_N": torch.ones(1, dtype=F64)}
        ).loss
        for i in range(7)
    ]
    by_sequence = torch.stack(losses).split(lengths)
    want = {
        "token-mean": torch.stack(losses).mean(),
        "seq-mean-token-mean": torch.stack([x.mean() for x in by_sequence]).mean(),
        "seq-mean-token-sum": torch.stack([x.sum() for x in by_sequence]).mean(),
        "seq-mean-token-sum-norm": torch.stack([x.sum() / 5 for x in by_sequence]).mean(),
    }[kind]
    weight = [AGGREGATIONS[kind](length) for length in lengths for _ in range(length)]
    got = policy_loss(**{**inputs, "weight_N": torch.tensor(weight, dtype=F64)}).loss
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_a_sequence_with_a_masked_sample_against_the_definition():
    changes = {
        "config": PolicyLossConfig(ratio_level="sequence"),
        "offsets": torch.tensor([0, 0, 4, 13], dtype=torch.int32),
    }
    inputs = make()
    inputs["logits_NV"][2, inputs["token_N"][2]] = -INF
    got, got_grad = loss_and_grad(policy_loss, inputs, **changes)
    want, want_grad = loss_and_grad(policy_loss_reference, inputs, **changes)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got_grad, want_grad, atol=1e-12, rtol=1e-12)


def test_a_sequence_ratio_by_hand():
    # log ratios 0.1 and 0.3: both tokens have ratio exp(0.2) > 1.2, so with A > 0 both are clipped;
    # with A < 0 each moves the ratio by half: slope 1/2 (2 + 4) exp(0.2) a token.
    behaviour = math.log(0.5) - torch.tensor([0.1, 0.3], dtype=F64)
    for sign, loss, slope in ((1, -1.2 * 6, 0.0), (-1, math.exp(0.2) * 6, 3 * math.exp(0.2))):
        logits = torch.zeros(2, 2, dtype=F64, requires_grad=True)
        result = policy_loss(
            logits,
            torch.tensor([0, 0]),
            behaviour,
            sign * torch.tensor([2.0, 4.0], dtype=F64),
            torch.ones(2, dtype=F64),
            offsets=torch.tensor([0, 2], dtype=torch.int32),
            config=PolicyLossConfig(ratio_level="sequence"),
        )
        result.loss.backward()
        assert result.loss.item() == pytest.approx(loss, abs=1e-12)
        assert (logits.grad[:, 0] / 0.5).tolist() == pytest.approx([slope, slope], abs=1e-12)


def test_the_ratio_on_the_behaviour_policy_is_1():
    inputs = make()
    first = policy_loss(**inputs)
    again = policy_loss(**{**inputs, "behaviour_logprob_N": first.logprob_N})
    assert again.metrics.ratio_sum.item() == 13
    assert again.metrics.ratio_max.item() == 1
    assert again.metrics.policy_kl_sum.item() == 0
    assert again.metrics.clipped_sum.item() == 0


@pytest.mark.parametrize("cuts", [[0, 13], [0, 1, 13], [0, 4, 5, 9, 13]])
def test_30_loss_is_by_global_tokens_not_mean_of_means(cuts):
    inputs = make()
    whole, grad = loss_and_grad(policy_loss, inputs)
    loss, grads = 0.0, []
    for start, end in pairwise(cuts):
        part = {k: x[start:end] if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
        result, piece = loss_and_grad(policy_loss, part)
        loss, grads = loss + result.loss, [*grads, piece]
    torch.testing.assert_close(loss, whole.loss, atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.cat(grads), grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "poisoned",
    [
        "logits_NV",
        "behaviour_logprob_N",
        "advantage_N",
        "ref_logprob_N",
        "importance_weight_N",
        "temperature",
    ],
)
def test_rows_of_weight_0_change_nothing_and_their_nans_do_not_leak(poisoned):
    drawn = 0.5 + torch.rand(2, 13, generator=torch.Generator().manual_seed(3), dtype=F64)
    inputs = {**make(), "importance_weight_N": drawn[0], "temperature": drawn[1]}
    want, want_grad = loss_and_grad(policy_loss, inputs)
    dead = {
        k: torch.cat([x, x[:2]]) if isinstance(x, torch.Tensor) else x for k, x in inputs.items()
    }
    dead["weight_N"] = dead["weight_N"].clone()
    dead["weight_N"][13:] = 0
    dead[poisoned] = dead[poisoned].clone()
    dead[poisoned][13:] = float("nan")
    got, grad = loss_and_grad(policy_loss, dead)
    assert got.loss == want.loss
    assert torch.equal(grad[:13], want_grad)
    assert not grad[13:].any()
    assert got.metrics.count.item() == 13
    for a, b in zip(got.metrics, want.metrics, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mark", [-100, 36])
def test_an_ignored_token_is_as_weight_0(mark):
    inputs = make()
    inputs["token_N"] %= 36  # 36 is a word that nobody sampled, as a pad token is
    token = inputs["token_N"].clone()
    token[3] = mark
    weight = inputs["weight_N"].clone()
    weight[3] = 0
    one, grad = loss_and_grad(policy_loss, inputs, token_N=token, ignore_index=mark)
    other, other_grad = loss_and_grad(policy_loss, inputs, weight_N=weight)
    assert one.loss == other.loss
    assert torch.equal(grad, other_grad)


def test_a_sampled_token_of_masked_vocabulary_has_ratio_and_gradient_0():
    inputs = make()
    logits = inputs["logits_NV"].clone()
    logits[2, inputs["token_N"][2]] = -INF
    result, grad = loss_and_grad(policy_loss, inputs, logits_NV=logits)
    assert result.logprob_N[2] == -INF
    assert torch.isfinite(result.loss)
    assert torch.isfinite(grad).all()
    assert not grad[2].any()


def test_metrics_are_sums_that_merge():
    inputs = make()
    whole = policy_loss(**inputs).metrics
    halves = [
        policy_loss(
            **{k: x[part] if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
        ).metrics
        for part in (slice(0, 6), slice(6, 13))
    ]
    for name, got, want in zip(whole._fields, halves[0].merge(halves[1]), whole, strict=True):
        assert got.item() == pytest.approx(want.item(), abs=1e-12), name
        assert not want.requires_grad


def in_place(inputs, **changes):
    inputs = {**inputs, **changes}
    leaf = inputs.pop("logits_NV").clone().requires_grad_()
    logits = leaf * 1.0
    result = policy_loss(logits, **inputs, inplace=True)
    return leaf, logits, result


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_in_place_is_the_same_to_the_bit(level):
    changes = {
        "config": PolicyLossConfig(ratio_level=level),
        "offsets": torch.tensor([0, 4, 13], dtype=torch.int32),
    }
    want, grad = loss_and_grad(policy_loss, make(), **changes)
    leaf, logits, result = in_place(make(), **changes)
    assert torch.equal(logits.detach(), grad)  # the memory of the logits holds their gradient
    (3 * result.loss).backward()
    assert result.loss == want.loss
    torch.testing.assert_close(leaf.grad, 3 * grad, atol=1e-15, rtol=1e-15)


def test_in_place_misuse_is_an_error_and_not_a_wrong_number():
    inputs = make()
    with pytest.raises(ValueError, match="came a leaf; leave it out"):
        policy_loss(**{**inputs, "logits_NV": inputs["logits_NV"].requires_grad_()}, inplace=True)
    inputs = make()
    expanded = (inputs["logits_NV"][:1].requires_grad_() * 1).expand(13, 37)
    with pytest.raises(ValueError, match="came an expanded or overlapping tensor"):
        policy_loss(**{**inputs, "logits_NV": expanded}, inplace=True)
    leaf, _, result = in_place(make())
    result.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through inplace=True"):
        result.loss.backward()
    leaf, logits, result = in_place(make())
    with pytest.raises(RuntimeError, match="used after inplace=True"):
        (result.loss + logits.sum()).backward()
    leaf = make()["logits_NV"].clone().requires_grad_()
    saved = leaf.exp()  # exp saves its result
    rest = {k: v for k, v in make().items() if k != "logits_NV"}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        policy_loss(saved, **rest, inplace=True).loss.backward()


def test_in_place_through_a_view_reaches_what_it_is_a_view_of():
    want, grad = loss_and_grad(policy_loss, make(n=12))
    rest = {k: v for k, v in make(n=12).items() if k != "logits_NV"}
    leaf = make(n=12)["logits_NV"].view(3, 4, 37).clone().requires_grad_()
    logits_BTV = leaf * 1.0  # what trainers have: (B, T, V), flattened for the loss
    result = policy_loss(logits_BTV.view(-1, 37), **rest, inplace=True)
    assert torch.equal(logits_BTV.detach().view(-1, 37), grad)
    result.loss.backward()
    assert result.loss == want.loss
    assert torch.equal(leaf.grad.view(-1, 37), grad)
    saved = leaf.exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        policy_loss(saved.view(-1, 37), **rest, inplace=True).loss.backward()


def test_in_place_never_writes_over_a_parameter_through_a_view_of_it():
    inputs = make()
    leaf = inputs.pop("logits_NV").requires_grad_()
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match="came a view of a leaf; leave it out"):
        policy_loss(leaf.view(-1, 37), **inputs, inplace=True)
    assert torch.equal(leaf.detach(), before)


def test_in_place_memory_that_overlaps_is_refused():
    inputs = make()
    windows = (inputs.pop("logits_NV").requires_grad_() * 1).as_strided((13, 37), (3, 1))
    with pytest.raises(ValueError, match="came an expanded or overlapping tensor"):
        policy_loss(windows, **inputs, inplace=True)


@pytest.mark.parametrize("as_view", [False, True])
def test_a_gradient_written_over_before_the_backward_is_an_error(as_view):
    inputs = make()
    logits = inputs.pop("logits_NV").requires_grad_() * 1.0
    result = policy_loss(logits.view(-1, 37) if as_view else logits, **inputs, inplace=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.loss.backward()


def test_in_place_without_a_gradient_leaves_the_logits_alone():
    inputs = make()
    before = inputs["logits_NV"].clone()
    policy_loss(**inputs, inplace=True)
    assert torch.equal(inputs["logits_NV"], before)


def test_grad_scale_may_stay_on_the_device():
    _, want = loss_and_grad(policy_loss, make())
    _, got = loss_and_grad(policy_loss, make(), grad_scale=torch.tensor(4.0))
    torch.testing.assert_close(got, want, atol=1e-15, rtol=1e-15)


def test_grad_scale_keeps_what_fp16_would_lose():
    inputs = {
        k: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in make().items()
    }
    inputs["weight_N"] = torch.full((13,), 1e-7)
    half = {**inputs, "logits_NV": inputs["logits_NV"].half()}
    grads = []
    for scale in (None, 2.0**16):
        logits = half["logits_NV"].clone().requires_grad_()
        rest = {k: v for k, v in half.items() if k != "logits_NV"}
        (policy_loss(logits, **rest, grad_scale=scale).loss * (scale or 1.0)).backward()
        grads.append(logits.grad.float() / (scale or 1.0))
    exact = loss_and_grad(policy_loss, {**half, "logits_NV": half["logits_NV"].float()})[1]
    lost, kept = ((grad - exact).norm() / exact.norm() for grad in grads)
    assert kept < 1e-3
    assert lost > 10 * kept


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"advantage_N": torch.zeros(2)},
            ValueError,
            r"advantage_N must have shape \(13,\).*came \(2,\)",
        ),
        (
            {"weight_N": torch.zeros(13).bool()},
            TypeError,
            "weight_N must hold floats, came torch.bool",
        ),
        ({"ref_logprob_N": None}, ValueError, "ref_logprob_N is needed where kl_coef is not 0"),
        ({"config": PolicyLossConfig(ratio_level="sequence")}, ValueError, "offsets are needed"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive, came -1.0"),
        ({"backend": "native"}, ValueError, "cannot run.*float32 and float64 came; cast it"),
        ({"backend": "cuda"}, ValueError, "'cuda' is no backend"),
    ],
)
def test_refusals_name_op_argument_wanted_and_came(change, error, message):
    with pytest.raises(error, match="^policy_loss: .*" + message):
        policy_loss(**{**make(), **change})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": -0.1}, "clip_low must be >= 0"),
        ({"dual_clip": 1.1}, r"dual_clip must be > 1 \+ clip_high = 1.2, came 1.1"),
        ({"kl_kind": "k4"}, "one of k1, abs, k2, k3, came 'k4'"),
        ({"ratio_level": "word"}, "one of token, sequence, came 'word'"),
        ({"log_ratio_limit": 0.0}, "log_ratio_limit must be > 0"),
    ],
)
def test_a_configuration_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PolicyLossConfig(**settings)
