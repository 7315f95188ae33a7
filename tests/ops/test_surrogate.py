"""`linear_policy_loss` with every loss by name, or with the caller's own, in all its ways."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo.ops import PolicyLossConfig, linear_policy_loss, losses, policy_loss
from fastppo.ops.losses import POLICY_LOSSES, SEQUENCE_LOSSES
from tests.ops.oracle import place
from tests.ops.references import linear_token_logprobs_reference
from tests.ops.registry import OPS, Shape, make_linear_policy_loss
from tests.ops.test_registration import Tracer, recorded
from tests.tiers import interpreted, slow_unless

F64 = torch.float64
N, V = 15, 67
OFFSETS = torch.tensor([0, 1, 1, 8, N], dtype=torch.int32)
SETTINGS: dict[str, float] = {
    "clip_low": 0.15,
    "clip_high": 0.3,
    "dual_clip": 1.6,
    "tau_pos": 1.2,
    "tau_neg": 2.0,
    "ratio_limit": 1.4,
}
TAKES = {
    "ppo_clip": ("clip_low", "clip_high", "dual_clip"),
    "dr_grpo": ("clip_low", "clip_high", "dual_clip"),
    "gspo": ("clip_low", "clip_high", "dual_clip"),
    "gspo_token": ("clip_low", "clip_high", "dual_clip"),
    "cispo": ("clip_low", "clip_high"),
    "sapo": ("tau_pos", "tau_neg"),
    "dppo_tv": ("clip_low", "clip_high", "ratio_limit"),
    "dppo_kl": ("clip_low", "clip_high", "ratio_limit"),
    "reinforce": (),
}
TRAINED = {
    "frozen": ("hidden_ND",),
    "with bias": ("hidden_ND", "bias_V"),
    "trained": ("hidden_ND", "weight_VD", "bias_V"),
}


def make(dtype: torch.dtype = F64, *, entropy: float = 0.02) -> dict[str, Any]:
    """A policy that has moved; unequal weights, one of them 0, and importance weights."""
    inputs = make_linear_policy_loss(Shape(n=N, vocab=V, hidden=16), dtype, 0)
    stat = inputs["weight_N"].dtype
    inputs["weight_N"] = torch.linspace(0.02, 0.2, N, dtype=stat)
    inputs["weight_N"][3] = 0
    inputs["importance_weight_N"] = torch.linspace(0.5, 2.0, N, dtype=stat)
    inputs["bias_V"] = torch.linspace(-1, 1, V, dtype=dtype)
    return {**inputs, "offsets": OFFSETS, "entropy_coef": entropy}


def plain(name: str, inputs: dict[str, Any]) -> Tensor:
    """The same from all logits at once, by the public loss and torch's autograd alone."""
    found = linear_token_logprobs_reference(
        inputs["hidden_ND"],
        inputs["weight_VD"],
        inputs["token_N"],
        bias_V=inputs["bias_V"],
        entropy_grad=True,
    )
    live_N = inputs["weight_N"] != 0
    settings: dict[str, Any] = {key: SETTINGS[key] for key in TAKES[name]}
    if name in SEQUENCE_LOSSES:
        settings["offsets"] = inputs["offsets"]
    given = (found.logprob_N, inputs["behaviour_logprob_N"], inputs["advantage_N"], live_N)
    loss_N = POLICY_LOSSES[name](*given, **settings).loss * inputs["importance_weight_N"]
    kl_N = losses.kl(found.logprob_N, inputs["ref_logprob_N"], live_N)
    bonus_N = inputs["entropy_coef"] * found.entropy_N.masked_fill(~live_N, 0)
    return (inputs["weight_N"] * (loss_N + inputs["kl_coef"] * kl_N - bonus_N)).sum()


def gradients(function: Any, inputs: dict[str, Any], trained: tuple[str, ...]) -> list[Tensor]:
    inputs = dict(inputs)
    for key in trained:
        inputs[key] = inputs[key].clone().requires_grad_()
    loss = function(inputs)
    loss.backward()
    return [loss.detach(), *(inputs[key].grad for key in trained)]


def by_name(name: str, **keywords: Any) -> Any:
    config = PolicyLossConfig(**SETTINGS)  # type: ignore[arg-type]
    return lambda inputs: linear_policy_loss(**inputs, loss=name, config=config, **keywords).loss


def test_every_loss_has_its_settings_here():
    assert set(TAKES) == set(POLICY_LOSSES)


@pytest.mark.parametrize(
    ("entropy", "on_policy"),
    slow_unless(
        lambda entropy, on_policy: (entropy > 0) != on_policy, product([0.0, 0.02], [False, True])
    ),
)
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_loss_and_gradients_are_those_of_the_public_function(name, trained, entropy, on_policy):
    inputs = make(entropy=entropy)
    if on_policy:
        inputs["behaviour_logprob_N"] = None
    want = gradients(lambda given: plain(name, given), inputs, trained)
    got = gradients(by_name(name, chunk_bytes=4 * V * 8), inputs, trained)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-11)


def of_a_kind(name):
    """A loss by token and one by sequence."""
    return name in ("cispo", "gspo")


@pytest.mark.parametrize("name", slow_unless(of_a_kind, POLICY_LOSSES))
def test_compiled_whole_it_gives_the_same_gradients(name, traced):
    torch._dynamo.reset()
    inputs = place(make(torch.float32, entropy=0.0), traced)
    want = gradients(by_name(name, backend=traced), inputs, ("hidden_ND",))
    compiled = torch.compile(by_name(name, backend=traced), fullgraph=True, backend="aot_eager")
    got = gradients(compiled, inputs, ("hidden_ND",))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", slow_unless(of_a_kind, POLICY_LOSSES))
def test_opcheck(name, traced):
    inputs = place({**make(torch.float32), "loss": name}, traced)
    inputs["hidden_ND"].requires_grad_()
    ((call, args),) = recorded(OPS["linear_policy_loss"], inputs, traced)
    torch.library.opcheck(call, args)


@pytest.mark.parametrize("name", ["gspo", "cispo"])
@interpreted(lambda name: name == "gspo")
def test_eager_and_registered_calls_give_the_same_bits(name, backend):
    inputs = place(make(torch.float32, entropy=0.0), backend)
    want = gradients(by_name(name, backend=backend), inputs, ("hidden_ND",))
    with Tracer():
        got = gradients(by_name(name, backend=backend), inputs, ("hidden_ND",))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_slope_in_16_bits_keeps_small_gradients_under_a_loss_scaler(dtype, backend):
    """Weights of 1e-7 underflow in float16; times a scale of 65536 none of them does."""
    inputs = make(dtype, entropy=0.0)
    inputs["weight_N"] = inputs["weight_N"] * 1e-6
    scale = 2.0**16
    exact = {
        k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in inputs.items()
    }
    want = gradients(by_name("gspo"), exact, ("hidden_ND",))[1]
    keywords = {"backend": backend, "grad_scale": scale, "logits_dtype": torch.float32}

    def scaled(given: dict[str, Any]) -> Tensor:
        return by_name("gspo", **keywords)(given) * scale

    got = gradients(scaled, place(inputs, backend), ("hidden_ND",))[1].cpu().double() / scale
    assert (got - want).norm() < 3e-2 * want.norm()


def test_on_policy_every_ratio_is_1(backend):
    inputs = place({**make(torch.float32), "behaviour_logprob_N": None}, backend)
    metrics = linear_policy_loss(**inputs, backend=backend).metrics
    assert metrics.ratio_sum == metrics.count == N - 1
    assert metrics.ratio_max == 1
    assert metrics.policy_kl_sum == metrics.clipped_sum == 0
    logits_NV = inputs["hidden_ND"] @ inputs["weight_VD"].T + inputs["bias_V"]
    rest = {k: x for k, x in inputs.items() if k not in ("hidden_ND", "weight_VD", "bias_V")}
    both = (policy_loss(logits_NV, **rest, backend=backend).loss, metrics)
    torch.testing.assert_close(
        both[0], metrics.surrogate + metrics.kl_loss + metrics.entropy_loss, atol=1e-5, rtol=1e-5
    )


def test_metrics_count_what_the_named_loss_clips():
    inputs = make()
    found = linear_policy_loss(**inputs, loss="cispo", config=PolicyLossConfig(**SETTINGS))
    ratio_N = (found.logprob_N - inputs["behaviour_logprob_N"]).exp()[inputs["weight_N"] != 0]
    outside = int(((ratio_N < 0.85) | (ratio_N > 1.3)).sum())
    assert 0 < outside < N - 1
    assert found.metrics.clipped_sum == outside
    torch.testing.assert_close(found.metrics.ratio_sum, ratio_N.sum())


OWN_TRAINED = [("hidden_ND",), ("hidden_ND", "weight_VD", "bias_V")]


@pytest.mark.parametrize("trained", OWN_TRAINED, ids="+".join)
def test_the_callers_own_loss_is_differentiated_chunk_by_chunk(trained):
    """The one below is PPO's, so it must give what the fused one gives."""
    inputs = make()
    seen: list[slice] = []

    def own(logprob_n: Tensor, entropy_n: Tensor, rows: slice) -> Tensor:
        seen.append(rows)
        old_n, advantage_n = inputs["behaviour_logprob_N"][rows], inputs["advantage_N"][rows]
        ratio_n = (logprob_n - old_n).exp()
        clipped_n = ratio_n.clamp(0.8, 1.2)
        return -torch.minimum(ratio_n * advantage_n, clipped_n * advantage_n)

    def call(**keywords: Any) -> Any:
        return lambda given: linear_policy_loss(**given, **keywords).loss

    want = gradients(call(), inputs, trained)
    got = gradients(call(loss=own, chunk_bytes=4 * V * 8), inputs, trained)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-11)
    assert len(seen) == 4
    assert [at.start for at in seen[1:]] == [at.stop for at in seen[:-1]]
    assert (seen[0].start, seen[-1].stop) == (0, N)


def test_the_callers_loss_of_the_entropy_adds_to_the_bonus():
    inputs = {**make(), "kl_coef": 0.0, "ref_logprob_N": None}
    twice = gradients(
        lambda given: linear_policy_loss(**given, loss=lambda lp, h, at: lp - 0.02 * h).loss,
        {**inputs, "importance_weight_N": None},
        ("hidden_ND",),
    )
    once = gradients(
        lambda given: linear_policy_loss(**given, loss=lambda lp, h, at: lp).loss,
        {**inputs, "importance_weight_N": None, "entropy_coef": 0.04},
        ("hidden_ND",),
    )
    for a, b in zip(twice, once, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-11)


def test_what_the_callers_loss_makes_of_a_dead_token_does_no_harm():
    """Its log-prob is given as 0, whose logarithm is not finite."""
    inputs = make()
    found = gradients(
        lambda given: linear_policy_loss(**given, loss=lambda lp, h, at: (-lp).log()).loss,
        inputs,
        ("hidden_ND",),
    )
    assert all(x.isfinite().all() for x in found)
    assert not found[1][3].any()


def test_the_callers_loss_breaks_the_graph_and_gives_the_same():
    torch._dynamo.reset()
    inputs = make()

    def call(given: dict[str, Any]) -> Tensor:
        return linear_policy_loss(**given, loss=lambda lp, h, at: lp.exp()).loss

    want = gradients(call, inputs, ("hidden_ND",))
    got = gradients(torch.compile(call, backend="aot_eager"), inputs, ("hidden_ND",))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "ppo"}, "loss must be a function or one of ppo_clip, .*, came 'ppo'"),
        ({"loss": 3}, "loss must be a function or one of ppo_clip, .*, came 3"),
        ({"loss": "gspo", "offsets": None}, "offsets are needed by loss='gspo', came None"),
        (
            {"loss": "cispo", "config": PolicyLossConfig(ratio_level="sequence")},
            "ratio_level='sequence' is loss='gspo'; leave it out with loss='cispo'",
        ),
        ({"loss": lambda lp, h, at: lp.sum()}, r"not reduced, \(15,\); came \(\)"),
        ({"loss": lambda lp, h, at: None}, r"not reduced, \(15,\); came NoneType"),
        ({"loss": lambda lp, h, at: lp.detach()}, "came one without gradient"),
    ],
)
def test_refusals_are_one_line(change, message):
    inputs = make()
    inputs["hidden_ND"].requires_grad_()
    with pytest.raises(ValueError, match="^linear_policy_loss: .*" + message) as raised:
        linear_policy_loss(**{**inputs, **change})
    assert "\n" not in str(raised.value)


def test_the_callers_loss_is_refused_where_there_are_no_values():
    inputs = {k: x.to("meta") if isinstance(x, Tensor) else x for k, x in make().items()}
    with pytest.raises(ValueError, match="loss=callable needs tensors with values"):
        linear_policy_loss(**inputs, loss=lambda lp, h, at: lp)


@pytest.mark.parametrize(("name", "kind"), [("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3")])
def test_a_kl_kind_has_verls_name_too(name, kind):
    found = [
        linear_policy_loss(**make(), config=PolicyLossConfig(kl_kind=each)).metrics.kl_loss
        for each in (name, kind)
    ]
    assert found[0] == found[1] != 0
